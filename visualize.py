"""Visualize: the pictures of the papers, each by one command.

    python visualize.py FIGURE ... --> figures/FIGURE.py --> a .png
                                       attention  curves

Idea     Many people meet a method through one figure, so each of them takes one command, works
         on any photograph with any weights, and is a function that other programs can call.
Paper    DINO fig. 1, 3 and 4; DINOv2 fig. 1 and 9; each file of figures/ names its place
Try      python visualize.py attention PHOTO --weights RUN_OR_FILE_OR_NAME
         python visualize.py curves RUN
Change   a new figure is one file in figures/ with ARGUMENTS, a Config and a `draw`, and one line
         in FIGURES
Tests    pytest tests/test_visualize.py
"""

from figures import attention, curves
from machinery.flags import UsageError, command, did_you_mean, parse, user_errors

# Each of these modules has ARGUMENTS, what has to be typed after the name of the figure, a
# dataclass Config, its flags, and a function draw(argument, config), which returns the path of
# the picture.
FIGURES = {"attention": attention, "curves": curves}

USAGE = "python visualize.py " + " | ".join(f"{name} {figure.ARGUMENTS}"
                                            for name, figure in FIGURES.items())


def overview() -> str:
    """The answer to `python visualize.py`: the figures, and where their flags are."""
    lines = [f"usage: {USAGE}", "", "The figures:"]
    for name, figure in FIGURES.items():
        lines.append(f"  {name:10s} {figure.draw.__doc__.splitlines()[0]}")
    lines += ["", "python visualize.py FIGURE --help lists the flags of that figure"]
    return "\n".join(lines)


@command
def main(argv):
    help_flags = ("-h", "--help")
    if not argv or argv[0] in help_flags:
        print(overview())
        return None
    if argv[0] not in FIGURES:
        raise UsageError(f"usage: {USAGE}{did_you_mean(argv[0], FIGURES)}")
    figure = FIGURES[argv[0]]
    usage = f"python visualize.py {argv[0]} {figure.ARGUMENTS} [--flag ...]"

    # The second word is the photo or the run; only --help may stand in its place.
    if argv[1:] and argv[1] in help_flags:
        return parse(figure.Config, argv[1:], usage=usage)
    if not argv[1:] or argv[1].startswith("--"):
        raise UsageError(f"usage: {USAGE}")
    target = argv[1]
    with user_errors():
        config = parse(figure.Config, argv[2:], usage=usage)
        path = figure.draw(target, config)
    print(f"wrote {path}")
    return path


if __name__ == "__main__":
    main()
