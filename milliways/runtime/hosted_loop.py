"""An asyncio loop in a reactor's thread, for gRPC: `Reactor(clock, make_loop=AsyncioLoop)`."""

import asyncio
from selectors import BaseSelector


class AsyncioLoop(asyncio.SelectorEventLoop):
    """A loop that waits with the selector that the reactor gives it."""

    def __init__(self, selector: BaseSelector) -> None:
        super().__init__(selector)

    def finish(self) -> None:
        """Cancels all tasks of the loop, and closes it."""
        tasks = asyncio.all_tasks(self)
        for task in tasks:
            task.cancel()
        if tasks:
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.run_until_complete(self.shutdown_asyncgens())
        self.close()
