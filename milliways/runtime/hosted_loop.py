"""An asyncio loop in a reactor's thread, for gRPC. Composition roots give it to their reactors."""

import asyncio
from selectors import BaseSelector


class AsyncioLoop(asyncio.SelectorEventLoop):
    """A loop that waits by the selector it is given: `Reactor(clock, make_loop=AsyncioLoop)`."""

    def __init__(self, selector: BaseSelector) -> None:
        super().__init__(selector)

    def finish(self) -> None:
        """Ends its tasks, and closes it."""
        tasks = asyncio.all_tasks(self)
        for task in tasks:
            task.cancel()
        if tasks:
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.run_until_complete(self.shutdown_asyncgens())
        self.close()
