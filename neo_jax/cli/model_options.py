"""Options of every command that loads a model."""

import argparse


def add_model_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    about = "a checkpoint directory, as published or converted"
    parser.add_argument("--model", required=required, metavar="DIR", help=about)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--weights", choices=("int8",), help="half the memory of bfloat16")
