"""Runs one seed again, and says what happened: `python -m tests.simulation.replay --seed 17`."""

import argparse
import logging

from tests.simulation.cluster import Simulation
from tests.simulation.controlled import ControlledSimulation
from tests.simulation.scenario import random_controlled_scenario, random_scenario, with_standby


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--faults", type=int, default=0, help="at most so many faults")
    parser.add_argument("--controlled", action="store_true", help="under the real controller")
    parser.add_argument("--standby", action="store_true", help="routers copy their blocks")
    parser.add_argument("--verbose", action="store_true", help="log what routers and workers log")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.DEBUG if arguments.verbose else logging.CRITICAL)
    draw = random_controlled_scenario if arguments.controlled else random_scenario
    scenario = draw(arguments.seed, arguments.faults)
    if arguments.standby:
        scenario = with_standby(scenario)
    simulation = (ControlledSimulation if arguments.controlled else Simulation)(scenario)
    print(repr(scenario))
    try:
        simulation.run()
    finally:
        print(*simulation.log, sep="\n")
        cluster = simulation.cluster
        print(f"{cluster.clock.now_s():.3f} s, {cluster.network.num_delivered} messages")


if __name__ == "__main__":
    main()
