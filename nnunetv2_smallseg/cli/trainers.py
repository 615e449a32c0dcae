"""``smallseg trainers``: lists every trainer with its network, paper, parameters and needed weights."""

from __future__ import annotations

import argparse
import json

from nnunetv2_smallseg import registry

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the sub-command."""
    parser = subparsers.add_parser("trainers", help="list all trainers")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.set_defaults(run=run)


def trainer_rows() -> list[dict]:
    """One dictionary a trainer: name, network, system, paper, parameters, weights, description.

    Network and parameters are None where the plans decide: trainers of nnU-Net's own network.
    """
    rows = []
    for system in registry.SYSTEMS:
        parameters = {network.name: network.parameters for network in system.networks}
        for trainer in system.trainers:
            size = next(iter(parameters[trainer.network].items())) if trainer.network else None
            rows.append(
                {
                    "name": trainer.name,
                    "network": trainer.network,
                    "system": system.name,
                    "paper": f"{system.paper.title}, {system.paper.venue}",
                    "paper_url": system.paper.url,
                    "parameters": size and size[1],
                    "parameters_for": size and {"input_channels": size[0][0], "num_classes": size[0][1]},
                    "weights": trainer.weights,
                    "description": trainer.description,
                }
            )
    return rows


def run(arguments: argparse.Namespace) -> int:
    """Prints the list on stdout."""
    rows = trainer_rows()
    if arguments.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return 0
    print(f"{'trainer':<34} {'network':<16} {'parameters':>11}  {'weights':<22} description")
    for row in rows:
        network = row["network"] or "of the plans"
        parameters = f"{row['parameters']:,}" if row["parameters"] else "-"
        print(f"{row['name']:<34} {network:<16} {parameters:>11}  {row['weights'] or '-':<22} {row['description']}")
    print()
    for system in registry.SYSTEMS:
        print(f"{system.name}: {system.paper.title}, {system.paper.venue}, {system.paper.url}")
    return 0
