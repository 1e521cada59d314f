"""Draws what `kvrelay bench pull --json` wrote: rates over slice sizes.

usage: plot_pull.py RESULT.json PLOT.svg
"""

import json
import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

# Ours strong, floors grey, others thin; what is not named here is drawn as others are.
STYLES = {
    "memcpy": dict(color="0.6", linestyle=":"),
    "best copy loop": dict(color="0.45", linestyle="--"),
    "process_vm_readv": dict(color="0.75", linestyle="-."),
    "tcp socket": dict(color="0.75", linestyle=(0, (1, 3))),
    "bare UCX stream": dict(color="0.75", linestyle=(0, (3, 3))),
    "mapped": dict(color="#c0392b", linewidth=2.4, zorder=5),
    "ucx-get": dict(color="#d68910", linewidth=2.0, zorder=4),
    "ucx-packed": dict(color="#2471a3", linewidth=2.0, zorder=4),
    "zmq-packed": dict(color="#1e8449", linewidth=2.0, zorder=4),
}


def size_name(size):
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size // unit} {name}"
    return f"{size} B"


def main(source, target):
    with open(source) as file:
        result = json.load(file)
    lines = {}
    for row in result["rows"]:
        if "gb_per_s" in row:
            lines.setdefault((row["way"], row["threads"]), []).append((row["slice_bytes"], row["gb_per_s"]))
    most = max(threads for _, threads in lines)
    plt.rcParams["svg.hashsalt"] = "kvrelay"  # the same picture for the same numbers
    figure, axes = plt.subplots(figsize=(9, 5.4))
    for (way, threads), points in lines.items():
        points.sort(key=lambda point: point[0])
        sizes = [size for size, _ in points]
        style = dict(STYLES.get(way, dict(linewidth=1.0)))
        if threads > 1:
            style["marker"] = "o"
            style["markersize"] = 3.5
        label = way if not any(w == way and t != threads for w, t in lines) else f"{way}, {threads} threads"
        axes.plot(sizes, [rate["median"] for _, rate in points], label=label.replace("1 threads", "1 thread"), **style)
        axes.fill_between(sizes, [rate["min"] for _, rate in points], [rate["max"] for _, rate in points],
                          color=axes.lines[-1].get_color(), alpha=0.12, linewidth=0)
    sizes = sorted({row["slice_bytes"] for row in result["rows"]})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [size_name(size) for size in sizes])
    axes.set_xlabel("contiguous slice")
    axes.set_ylabel("GB/s, median (band: min to max)")
    axes.set_title(f"Pulling scattered slices from another process, {most} cores")
    axes.grid(True, which="major", color="0.9")
    axes.legend(fontsize=7, ncol=2, loc="lower right", framealpha=0.9)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:3])
