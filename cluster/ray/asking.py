"""How others ask the controller of a Ray cluster that they have joined."""

# Ray's own types are unknown in part.
# pyright: basic

import time
from typing import Any

from milliways.wire.errors import ClusterError, StartupError, UnavailableError

ANSWER_TIMEOUT_S = 30.0
# An ingress starts a new controller within seconds; that one has to find its workers.
NEXT_CONTROLLER_TIMEOUT_S = 60.0
POLL_S = 0.5


class RunningController:
    """The controller of the Ray cluster that this process has joined."""

    def ask(self, method: str, *arguments: Any, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """The answer of the controller.

        Raises:
            ControllerGoneError: there is no controller, or it dies meanwhile.
            StartupError: it does not answer.
            ClusterError: its own error.
        """
        # Not before: Ray reads its settings when it is imported.
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

        from milliways.cluster.ray.start_controller import find_controller

        try:
            reference = getattr(find_controller(), method).remote(*arguments)
            return ray.get(reference, timeout=timeout_s)
        except RayTaskError as error:
            # Our own error is the cause; Ray's would print the controller's traceback as well.
            raise (error.cause if isinstance(error.cause, ClusterError) else error) from None
        except GetTimeoutError as error:
            raise StartupError(f"the controller does not answer within {timeout_s:g} s") from error
        except (ValueError, RayActorError) as error:
            text = "the Ray cluster runs, but no Milliways controller in it"
            raise ControllerGoneError(text) from error

    def ask_next(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """As `ask`, but waits for a controller to come, and asks again if it dies.

        The question must be one that may be repeated.
        """
        last_s = time.monotonic()
        while True:
            asked_s = time.monotonic()
            try:
                return self.ask(method, *arguments, timeout_s=timeout_s)
            except (ControllerGoneError, UnavailableError) as error:
                now_s = time.monotonic()
                if isinstance(error, ControllerGoneError) and now_s > asked_s + POLL_S:
                    # It was there, and died.
                    last_s = now_s
                if now_s > last_s + NEXT_CONTROLLER_TIMEOUT_S:
                    raise
                time.sleep(POLL_S)


class ControllerGoneError(StartupError):
    """The Ray cluster has no controller now."""
