"""What becomes of the runs of `claims.py`: figures computed of them, CSVs, tables and drawings."""
import csv

import numpy as np

import checkpoints
import pictures
import runtime


def model_size(row, done):
    """Parameters of the transformer, and operations: 6 for each of them and each of 32 x 16 tokens a step."""
    parameters = sum(p.numel() for p in checkpoints.load_ar(str(done[2]))[0].parameters())
    return {"parameters": parameters, "flops": 6 * parameters * 32 * 16 * row.get("steps", 600)}


def prefixes(row, done):
    """How many first tokens tell each of N images from all others (mean), and how many a new one shares."""
    codes = np.fromfile(done[1].tokens, "<i8").reshape(-1, 16)    # (20000, 16): the last 1,000 are new
    n = row["images"]
    codes = np.concatenate([codes[:n], codes[-1000:]])
    needed, shared = 1, 0
    for t in range(1, 17):
        _, group = np.unique(codes[:, :t], axis=0, return_inverse=True)
        of_group = np.bincount(group.ravel()[:n], minlength=len(codes))
        needed += (of_group[group.ravel()[:n]] > 1).mean()
        shared += (of_group[group.ravel()[n:]] > 0).mean()
    return {"tokens needed": needed, "log2 N / K": np.log2(n) / row["bits"], "tokens shared": shared}


def settings(**axes):
    """All combinations of the values of some axes, as dicts."""
    rows = [{}]
    for name, values in axes.items():
        rows = [{**row, name: value} for row in rows for value in values]
    return rows


def columns(claim):
    """Header of a claim's CSV."""
    return [*claim.settings[0], "seed", *claim.figures, "seconds", "version"]


def read_rows(claim, path):
    """The rows {column: text} of a claim's CSV; a last line that was cut off is none."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    header, *lines = csv.reader(whole.splitlines() or [",".join(columns(claim))])
    runtime.require(header == columns(claim), f"{path}: its columns are not "
                    f"{', '.join(columns(claim))}; it is of another claim or version: move it away")
    return [dict(zip(header, line)) for line in lines]


def append_row(claim, path, row):
    """Add a row {column: value} to a claim's CSV; what it lacks stays empty."""
    rows = [*read_rows(claim, path), row]
    with runtime.atomic(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns(claim), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def means(claim, rows):
    """{setting, a tuple of texts: {figure: (mean, standard deviation)}}, in the claim's order."""
    found = {}
    for setting in claim.settings:
        key = tuple(map(str, setting.values()))
        own = [row for row in rows if tuple(row[column] for column in setting) == key]
        for figure in claim.figures:
            values = [float(row[figure]) for row in own if row[figure]]
            if values:
                deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
                found.setdefault(key, {})[figure] = (np.mean(values), deviation)
    return found


def table(name, claim, rows):
    """A claim in markdown: its sentence, mean and standard deviation over seeds, its figure."""
    header = [*claim.settings[0], *claim.figures]
    lines = [f"## {name}", "", f"> {claim.sentence}", "", "| " + " | ".join(header) + " |",
             "|" + "---|" * len(header)]
    for key, found in means(claim, rows).items():
        cells = [f"{found[figure][0]:.4g} ± {found[figure][1]:.2g}" if figure in found else ""
                 for figure in claim.figures]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    return "\n".join([*lines, "", f"{len({row['seed'] for row in rows})} seeds.", "",
                      f"![{name}](../assets/claims/{name}.png)", "", ""])


def draw(claim, sources, path):
    """Write a claim's figure: a panel for each figure, whiskers of one deviation; dots for the stored rows in
    `sources`, crosses for the reader's own."""
    pyplot = pictures.import_pyplot()
    names = list(claim.settings[0])
    numbers = claim.x in claim.figures or isinstance(claim.settings[0][claim.x], (int, float))
    shown = [figure for figure in claim.figures if figure not in (claim.x, "flops")]
    figure, panels = pyplot.subplots(1, len(shown), figsize=(3.1 * len(shown), 3.4), squeeze=False)
    for panel, quantity in zip(panels[0], shown):
        panel.set_title(quantity)
        panel.grid(alpha=0.3)
        for rows, marker in zip(sources, "ox"):
            lines = {}                                       # {value of claim.lines: [(x, mean, deviation)]}
            for key, found in means(claim, rows).items():
                if quantity in found:
                    x = found[claim.x][0] if claim.x in found else key[names.index(claim.x)]
                    line = key[names.index(claim.lines)] if claim.lines else ""
                    lines.setdefault(line, []).append((float(x) if numbers else x, *found[quantity]))
            for number, (line, points) in enumerate(lines.items()):
                panel.errorbar(*zip(*points), marker=marker, linestyle="-" if numbers else "none", capsize=3,
                               color=f"C{number}", label=f"{line}, yours" if marker == "x" else line)
        if claim.x in ("parameters", "images"):
            panel.set_xscale("log")
        panel.tick_params("x", rotation=0 if numbers else 60)
    if claim.lines:
        panels[0][0].legend(title=claim.lines, frameon=False, fontsize=8)
    figure.supxlabel(claim.x)
    figure.tight_layout()
    with runtime.atomic(path) as temporary:
        figure.savefig(temporary, dpi=80, format="png")
    pyplot.close(figure)
