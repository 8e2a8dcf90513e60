"""Repeats the run of one seed, or one schedule of the kill matrix, and prints what happened.

python -m tests.simulation.replay --seed 17 --faults 4
python -m tests.simulation.replay --matrix 2w-1r-layers-out --mode top-p --kill 17:w1,40:w0
"""

import argparse
import logging

from tests.simulation.cluster import Simulation
from tests.simulation.controlled import ControlledSimulation
from tests.simulation.kill_matrix import LED_SHAPES, MODES, SHAPES, Blow, blows_of, cell_of
from tests.simulation.scenario import random_controlled_scenario, random_scenario, with_standby


def main() -> None:
    arguments = read_arguments()
    logging.basicConfig(level=logging.DEBUG if arguments.verbose else logging.CRITICAL)
    simulation = of_matrix(arguments) if arguments.matrix else of_seed(arguments)
    print(repr(simulation.scenario))
    try:
        simulation.run()
    finally:
        print(*simulation.log, sep="\n")
        for journal in simulation.ingress.journals:
            texts = [stream.text for stream in journal.streams()]
            print(journal.request_id, texts, f"in {journal.num_attempts} attempts")
        cluster = simulation.cluster
        print(f"{cluster.clock.now_s():.3f} s, {cluster.network.num_delivered} messages")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--seed", type=int)
    what.add_argument("--matrix", choices=[str(shape) for shape in (*SHAPES, *LED_SHAPES)])
    parser.add_argument("--faults", type=int, default=0, help="largest number of faults")
    parser.add_argument("--controlled", action="store_true", help="run under the real controller")
    parser.add_argument("--standby", action="store_true", help="let routers copy their KV blocks")
    parser.add_argument("--mode", choices=list(MODES), default="greedy")
    parser.add_argument(
        "--kill",
        type=blows_of,
        default=(),
        help="message:victim pairs",
    )
    parser.add_argument("--blow", choices=[b.value for b in Blow], default=Blow.KILL.value)
    parser.add_argument("--verbose", action="store_true", help="print logs of routers and workers")
    return parser.parse_args()


def of_seed(arguments: argparse.Namespace) -> Simulation:
    draw = random_controlled_scenario if arguments.controlled else random_scenario
    scenario = draw(arguments.seed, arguments.faults)
    if arguments.standby:
        scenario = with_standby(scenario)
    return (ControlledSimulation if arguments.controlled else Simulation)(scenario)


def of_matrix(arguments: argparse.Namespace) -> Simulation:
    cell = cell_of(arguments.matrix, arguments.mode)
    return cell.struck(arguments.kill, Blow(arguments.blow))


if __name__ == "__main__":
    main()
