"""Visualize: the pictures of the papers, each by one command.

    python visualize.py FIGURE ... --> figures/FIGURE.py --> a .png
        of photographs                 attention  pca  similarity  match  norms  views  video
        of a set of images             neighbours  prototypes  embedding
        of runs                        curves  story

Idea     Many people meet a method through one figure, so each of them takes one command, works
         on any photograph with any weights, and is a function that other programs can call.
Paper    DINO fig. 1, 3 and 4; DINOv2 fig. 1 and 9; each file of figures/ names its place
Try      python visualize.py attention PHOTO --weights RUN_OR_FILE_OR_NAME
         python visualize.py pca PHOTO PHOTO --weights RUN_OR_FILE_OR_NAME
         python visualize.py curves RUN
Change   a new figure is one file in figures/ with ARGUMENTS, a Config and a `draw`, and one line
         in FIGURES
Tests    pytest tests/test_visualize.py
"""

from itertools import takewhile

from figures import (attention, curves, embedding, lecture, match, neighbours, norms, pca,
                     prototypes, similarity, story, video, views)
from machinery.flags import UsageError, command, did_you_mean, parse, user_errors

# Each of these modules has ARGUMENTS, what has to be typed after the name of the figure, a
# dataclass Config, its flags, and a function draw(arguments, config), which gets the typed
# words as a list and returns the path of the picture.
FIGURES = {
    "attention": attention, "curves": curves, "story": story, "pca": pca, "match": match,
    "similarity": similarity, "video": video, "views": views, "neighbours": neighbours,
    "norms": norms, "prototypes": prototypes, "embedding": embedding, "lecture": lecture}

USAGE = f"python visualize.py {' | '.join(FIGURES)} ..."


def overview() -> str:
    """The answer to `python visualize.py`: the figures, and where their flags are."""
    # What a figure shows is the first line of the docstring of its function, so that a new line
    # in FIGURES needs no second place to be explained in.
    lines = [f"usage: {USAGE}", "", "The figures:"]
    for name, figure in FIGURES.items():
        lines.append(f"  {name:12s}{figure.draw.__doc__.splitlines()[0]}")
        lines.append(f"              {name} {figure.ARGUMENTS}")
    lines += ["", "python visualize.py FIGURE --help lists the flags of that figure"]
    return "\n".join(lines)


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """What follows the name of a figure -> the photos or runs, and the flags with their values.

    All words before the first flag are photos or runs. None can come after it, because there
    it might belong to a flag of several words: a.jpg b.jpg --weights A B.
    """
    arguments = list(takewhile(lambda word: not word.startswith("-"), words))
    return arguments, words[len(arguments):]


@command
def main(argv):
    # The first word is the name of a figure. Without it, or with a request for help, the answer
    # is what there is to choose from.
    help_flags = ("-h", "--help")
    if not argv or argv[0] in help_flags:
        print(overview())
        return None
    if argv[0] not in FIGURES:
        raise UsageError(f"usage: {USAGE}{did_you_mean(argv[0], FIGURES)}")
    figure = FIGURES[argv[0]]
    usage = f"python visualize.py {argv[0]} {figure.ARGUMENTS} [--flag ...]"

    # Something has to be drawn, unless the question is which flags there are: then `parse` prints
    # them and ends the program.
    arguments, flags = split(argv[1:])
    if not arguments and not set(flags) & set(help_flags):
        raise UsageError(f"usage: {usage}")

    # A photo that cannot be read, or weights that do not fit, are the user's to mend: inside,
    # a ValueError becomes one line.
    with user_errors():
        config = parse(figure.Config, flags, usage=usage)
        path = figure.draw(arguments, config)
    print(f"wrote {path}")
    return path


if __name__ == "__main__":
    main()
