"""Table: what bench/gpu.sh wrote, as the rows of the table in docs/performance.md.

    gpu-2.json, gpu-3.json --> | `dino_vits16`, batch 448 | 1,700 images/s | H100 | Nov 26 |

Idea     Figures that are copied by hand get mixed up. So the rows are made of the files.
Paper    none
Try      python -m bench table gpu-*.json
Change   another column of a step is one entry of `cells` in speed_cell
Tests    pytest tests/bench/test_table.py
"""

import json
from pathlib import Path

from machinery.flags import UsageError


def table(names: list[str]) -> str:
    """The rows for files that `python -m bench step` wrote (--json), in Markdown.

    Files of other tasks are named in a line of their own. UsageError for what is no such file.
    """
    if not names:
        raise UsageError("python -m bench table: which files? Give those of --json")

    lines = []
    for name in names:
        # The file itself says what was measured, on what and when.
        path = Path(name)
        try:
            result = json.loads(path.read_text())
            task = result["task"]
            rows = figures_of(result) if task == "step" else []
        except (OSError, ValueError, TypeError, KeyError) as error:
            # A UnicodeDecodeError would print the whole file.
            reason = f"{type(error).__name__}: {error!s:.60}"
            raise UsageError(
                f"{name}: not a file of python -m bench --json ({reason})") from None

        # Other tasks measure something else in each, which has no common form of a row. Their
        # figures are copied by hand, so that a file is named and not passed over in silence.
        if task != "step":
            lines.append(f"(no row for {name}: it is of the task {task})")
            continue

        day = result["day"]
        command = path.stem.replace("-", " ")  # gpu-3.json is of "gpu 3"
        for figure, value in rows:
            lines.append(f"| {figure} | {value} | {result['device']} | {day} | {command} |")
    return "\n".join(lines)


def figures_of(result: dict) -> list[tuple[str, str]]:
    """(what was measured, its value) of each row: ours, from files, then the other versions."""
    # Seconds depend on the batch and on the precision as much as on the network, so a row names
    # all three.
    name = f"`{result['preset']}`, batch {result['batch_size_per_gpu']}, {result['precision']}"
    rows = [(name, speed_cell(result))]

    # With --data the step was timed once more, fed by the loader. How long it waited for images
    # tells whether they or the step limit the speed.
    if "from_files" in result:
        loader = result["from_files"]
        value = f"{loader['images_per_second']:,.0f} images/s, wait {loader['waiting']:.0%}"
        rows.append(("the same from files", value))

    # The other versions are compared with ours by pairs of the same turn. One that did not fit
    # into the GPU's memory has no seconds; its row says so, since that is a result as well.
    versions = {f"without {idea}": row for idea, row in result.get("without", {}).items()}
    if "plain" in result:
        versions["the plain version"] = result["plain"]
    for version, row in versions.items():
        if "out_of_memory" in row:
            rows.append((version, "out of memory"))
        else:
            value = f"{row['ratio']:.2f} times our seconds, {row['peak_memory_gb']:.1f} GB"
            rows.append((version, value))
    return rows


def speed_cell(result: dict) -> str:
    """Images a second, share of the ceiling, and memory of our version."""
    # The share is of the most that this GPU reached in one product during the same minutes, not
    # of its data sheet.
    cells = [f"{result['images_per_second']:,.0f} images/s"]
    cells.append(f"{result['share_of_ceiling']:.0%} of {result['ceiling_tflops']:.0f} TFLOP/s")
    cells.append(f"{result['peak_memory_gb']:.1f} GB")
    return ", ".join(cells)
