"""The door. The first word decides what is imported, so that help comes at once."""

import importlib
import sys

TRAINER = {
    "fit": "train a part: --config configs/{clip,prior,ar_prior,decoder,upsampler}/*.yaml",
    "validate": "its loss on the validation split",
    "test": "score a model or compare the priors: --config configs/{evaluate,compare}/*.yaml",
    "predict": "write embeddings (priors) or images (decoder, upsampler)",
}
COMMANDS = {
    "pack": "make image-caption shards: shapes, folder or coco",
    "precompute": "encode shards with a frozen CLIP into an embedding store",
    "codec": "fit the AR prior's codec (PCA and buckets) on a store",
    "linear": "fit the linear prior (ridge regression) on a store",
    "sample": 'draw images: unclip sample "a large red star" --run runs/quickstart',
    "reconstruct": "pictures to their latents and back: unclip reconstruct PICTURE…",
    "vary": "variations of pictures: unclip vary PICTURE…",
    "interpolate": "what lies between two pictures: unclip interpolate PICTURE PICTURE",
    "edit": 'text diffs: unclip edit PICTURE… --current "a red circle" --caption "a blue circle"',
    "probe": "pictures of ever more dimensions of an embedding: unclip probe PICTURE…",
    "reproduce": "run a recipe's stages in order, resuming: --config configs/reproduce/*.yaml",
    "bundle": "a run as one file, in half precision: unclip bundle RUN",
    "import": "make a run of somebody else's checkpoints: unclip import karlo PATH…",
    "report": "write a run's report again from its report.json",
}


def usage() -> str:
    """What ``unclip --help`` says."""
    lines = ["usage: unclip COMMAND [ARGUMENTS]   (unclip COMMAND --help for more; --debug shows tracebacks)", ""]
    for title, words in (("training and evaluation", TRAINER), ("commands", COMMANDS)):
        lines += [f"{title}:", *(f"  {word:<11} {what}" for word, what in words.items()), ""]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words after the program's name; None reads ``sys.argv``.

    Returns:
        The exit status: 0, 1 for an error of the run, 2 for a word that is not a command.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    if debug:
        words.remove("--debug")
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(importlib.import_module("importlib.metadata").version("unclip_pl"))
        return 0
    if words[0] not in TRAINER | COMMANDS:
        print(f"error: unknown command {words[0]!r}.\n\n{usage()}", file=sys.stderr)
        return 2
    return importlib.import_module("unclip_pl.cli").run(words, debug=debug)


if __name__ == "__main__":
    sys.exit(main())
