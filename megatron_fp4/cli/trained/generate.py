"""`megatron-fp4 generate RUN --prompt "def "`: continue texts with the weights of a run, in its evaluation precision.

In one process, whatever layout wrote the checkpoint, or under torchrun on the run's tp * pp ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_fp4.cli.arguments import CommandParser
from megatron_fp4.cli.trained.opening import add_choice, with_trained
from megatron_fp4.inference.generate import TextGenerator
from megatron_fp4.inference.model import RowModel, Sampling
from megatron_fp4.train.open import TrainedModel

PROMPTS = ["import os\n", "def main(", '"""Return the']

EXITS = {0: "done", 1: "failed"}


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 2 where run, checkpoint or tokenizer are not there."""
    parser = CommandParser("generate", __doc__, EXITS, "runs/mine --prompt 'import os' --tokens 40")
    add_choice(parser)
    parser.add_argument("--prompt", action="append", help="text to continue; may be given several times")
    parser.add_argument("--tokens", type=int, default=60, help="tokens to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16, help="prompts at once, where no activation is quantized")
    parser.add_argument("--no-cache", action="store_true", help="compute the whole text anew for every token")
    args = parser.parse_args(arguments)

    def use(trained: TrainedModel) -> None:
        prompts = args.prompt or PROMPTS
        generator = TextGenerator(trained, RowModel(trained, batch=args.batch, cache=not args.no_cache))
        sampling = Sampling(args.temperature, args.top_k, args.seed)
        for prompt, text in zip(prompts, generator.continuations(prompts, args.tokens, sampling), strict=False):
            print(f"--- {prompt!r}\n{prompt}{text}")

    return with_trained(args, use, documents_apart=True)
