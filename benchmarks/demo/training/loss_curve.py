"""The loss of a training run: collects it, saves it as CSV, and plots it."""

import csv
from pathlib import Path

import jax
import numpy as np

# A line of the file is the mean of this many steps. So the file is small, and the curve smooth.
STEPS_PER_POINT = 25
_COLUMNS = ("step", "tokens", "loss")


class LossCurve:
    """The loss by step. `add` does not read the array of a loss, so that no step waits for it.

    Invariant: `_pending` has the losses after the last point, fewer than `STEPS_PER_POINT`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._points: list[tuple[int, int, float]] = []
        self._pending: list[jax.Array] = []
        self.num_tokens = 0

    def add(self, step: int, num_tokens: int, loss: jax.Array) -> None:
        self.num_tokens += num_tokens
        self._pending.append(loss)
        if step % STEPS_PER_POINT == 0:
            mean_loss = float(np.mean([float(loss) for loss in self._pending]))
            self._points.append((step, self.num_tokens, mean_loss))
            self._pending.clear()

    def recent_loss(self, num_points: int = 5) -> float:
        return float(np.mean([loss for _, _, loss in self._points[-num_points:]]))

    def save(self) -> None:
        with self._path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(_COLUMNS)
            writer.writerows((step, tokens, f"{loss:.4f}") for step, tokens, loss in self._points)

    def restore(self, step: int) -> None:
        """Loads a saved curve, up to the step from which training resumes."""
        self._points = [point for point in read_points(self._path) if point[0] <= step]
        self.num_tokens = self._points[-1][1] if self._points else 0


def read_points(path: Path) -> list[tuple[int, int, float]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [(int(row["step"]), int(row["tokens"]), float(row["loss"])) for row in rows]


def plot_loss(csv_path: Path, plot_path: Path) -> None:
    """Plots the curve, and copies its data to the folder of the plot."""
    # Imported here: only the end of a run plots, and the import takes seconds.
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    points = read_points(csv_path)
    # Without a date and with fixed ids, the same curve gives the same file.
    pyplot.rcParams["svg.hashsalt"] = "milliways"
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    axes.plot([tokens / 1e6 for _, tokens, _ in points], [loss for _, _, loss in points], lw=1)
    axes.set_xlabel("tokens trained, millions")
    axes.set_ylabel("loss, nats per token")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    plot_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(plot_path, metadata={"Date": None})
    pyplot.close(figure)
    plot_path.with_suffix(".csv").write_bytes(csv_path.read_bytes())
