"""What becomes of the runs of `claims.py`: figures computed of them, CSVs, tables and drawings."""
import csv
import pathlib
import shutil

import numpy as np
from PIL import Image

from support import checkpoints, curves, runtime, tokens


def model_size(row, done):
    """Parameters of the transformer, and operations: 6 for each of them and each of 32 x 16 tokens a step."""
    parameters = sum(p.numel() for p in checkpoints.load_ar(str(done[2]))[0].parameters())
    return {"parameters": parameters, "flops": 6 * parameters * 32 * 16 * row.get("steps", 600)}


def prefixes(row, done):
    """How many first tokens tell each of N images from all others (mean), and how many a new one shares."""
    header = runtime.read_json(done[1].tokens.with_suffix(".json"))
    ids = tokens.open_ids(done[1].tokens, header)[:, 0]           # (20000, 16): the last 1,000 are new
    n = row["images"]
    ids = np.concatenate([ids[:n], ids[-1000:]])
    needed, shared = 1, 0
    for t in range(1, 17):
        _, group = np.unique(ids[:, :t], axis=0, return_inverse=True)
        of_group = np.bincount(group.ravel()[:n], minlength=len(ids))
        needed += (of_group[group.ravel()[:n]] > 1).mean()
        shared += (of_group[group.ravel()[n:]] > 0).mean()
    return {"tokens needed": needed, "log2 N / K": np.log2(n) / row["bits"], "tokens shared": shared}


def entropy_cost(row, done):
    """Time and memory of one form of the entropy term."""
    return runtime.read_json(done[0].folder / "bench.json")[row["form"]]


def keep_images(row, done):
    """No figures, but the grid of originals and reconstructions, for `side_by_side`."""
    (grid,) = done[1].folder.glob("reconstruction-*.png")
    shutil.copy(grid, done[1].folder.parent / f"{row['loss']}.png")
    return {}


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


def power_laws(claim, rows):
    """{(x, line): (factor, exponent, its standard error)} of the first figure over parameters, for each line,
    and over operations, for all: figure = factor * x ^ exponent, by least squares of the logarithms of all
    runs. Each seed has a factor of its own, as its tokenizer may make easy tokens; the mean is returned.
    """
    groups = {}
    for row in rows if isinstance(claim.x, list) else ():
        groups.setdefault(("parameters", row[claim.lines]), []).append(row)
        groups.setdefault(("flops", "all"), []).append(row)
    laws = {}
    for (x, line), points in groups.items():
        sizes = np.log([float(row[x]) for row in points])
        seeds = sorted({row["seed"] for row in points})
        of_seed = [[row["seed"] == seed for seed in seeds] for row in points]
        design = np.column_stack([sizes, of_seed])                        # (runs, 1 + seeds)
        targets = np.log([float(row[claim.figures[0]]) for row in points])
        spare = len(points) - design.shape[1]
        if spare > 0 and np.ptp(sizes) > 0:
            inverse = np.linalg.inv(design.T @ design)
            exponent, *levels = inverse @ design.T @ targets
            rest = targets - design @ [exponent, *levels]
            error = np.sqrt(rest @ rest / spare * inverse[0, 0])
            laws[x, line] = (np.exp(np.mean(levels)), exponent, error)
    return laws


def table(name, claim, rows):
    """A claim in markdown: its sentence, mean and standard deviation over seeds, its figure."""
    header = [*claim.settings[0], *claim.figures]
    lines = [f"## {name}", "", f"> {claim.sentence}", "", "| " + " | ".join(header) + " |",
             "|" + "---|" * len(header)]
    for key, found in means(claim, rows).items():
        cells = [f"{found[figure][0]:.4g} ± {found[figure][1]:.2g}" if figure in found else ""
                 for figure in claim.figures]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    for (x, line), (factor, exponent, error) in power_laws(claim, rows).items():
        lines += ["", f"Power law, {claim.lines} {line}: {claim.figures[0]} = {factor:.3g} x "
                      f"{x}^{exponent:.4f}, standard error of the exponent {error:.4f}."]
    return "\n".join([*lines, "", f"{len({row['seed'] for row in rows})} seeds.", "",
                      f"![{name}](../assets/claims/{name}.png)", "", ""])


LOGARITHMIC = ("parameters", "flops", "images")                           # horizontal axes


def draw(claim, sources, path, small=False):
    """Write a claim's figure: a panel for each figure, whiskers of one deviation; dots for the stored rows in
    `sources`, crosses for the reader's own. small: two of the panels, to be read at a width of 300."""
    pyplot = curves.import_pyplot()
    names = list(claim.settings[0])
    laws = power_laws(claim, sources[0])
    xs = claim.x if isinstance(claim.x, list) else [claim.x]
    numbers = xs[0] in claim.figures or isinstance(claim.settings[0][xs[0]], (int, float))
    found = means(claim, sources[0]).values()
    varied = [quantity for quantity in claim.figures         # a constant, such as of dead bits, is no picture
              if len({each[quantity][0] for each in found if quantity in each}) > 1] or claim.figures
    shown = [(x, quantity) for x in xs for quantity in varied if quantity not in (*xs, "flops")]
    if small:                                                # how well, and how: what the claims are about
        usage = [one for one in shown if one[1] == "usage"]
        shown = [*shown[:1], *(usage or shown[1:2])]
    width, height = (2.1, 2.2) if small else (3.1, 3.4)
    figure, panels = pyplot.subplots(1, len(shown), squeeze=False,
                                     figsize=(width * len(shown), height + (0 if numbers else 1)))
    for panel, (x, quantity) in zip(panels[0], shown):
        panel.set_title(quantity)
        panel.set_xlabel(x)
        panel.set_xscale("log" if x in LOGARITHMIC else "linear")
        panel.set_yscale("log" if quantity in ("ms", "MiB") else "linear")
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        for rows, marker in zip(sources, "ox"):
            lines = {}                                       # {value of claim.lines: [(x, mean, deviation)]}
            for key, found in means(claim, rows).items():
                if quantity in found:
                    at = found[x][0] if x in found else key[names.index(x)]
                    line = key[names.index(claim.lines)] if claim.lines else ""
                    lines.setdefault(line, []).append((float(at) if numbers else at, *found[quantity]))
            for number, (line, points) in enumerate(lines.items()):
                panel.errorbar(*zip(*points), marker=marker, linestyle="-" if numbers else "none", capsize=3,
                               color=f"C{number}", label=f"{line}, yours" if marker == "x" else line)
        for (of, _), (factor, exponent, _) in laws.items():
            if of == x:
                sizes = np.geomspace(*panel.get_xlim())
                panel.plot(sizes, factor * sizes ** exponent, "--", color="gray", linewidth=1, scalex=False)
        if not numbers:
            pyplot.setp(panel.get_xticklabels(), rotation=50, ha="right", rotation_mode="anchor")
    if claim.lines:
        panels[0][-1 if small else 0].legend(title=claim.lines, frameon=False, fontsize=6 if small else 8)
    figure.tight_layout()
    save(figure, path, 150 if small else 80)


def side_by_side(names, runs_dir, path):
    """Write one row of held-out images, and a row of what is left of them for each of `names`, settings whose
    grids `keep_images` has left; nothing where these are gone."""
    grids = {name: runs_dir / f"{name}.png" for name in names if (runs_dir / f"{name}.png").exists()}
    if not grids:
        return
    pyplot = curves.import_pyplot()
    strips = {}
    for name, grid in grids.items():
        pixels = np.asarray(Image.open(grid))
        half = len(pixels) // 2                                           # originals above, line by line
        strips.setdefault("original", pixels[:half])
        strips[name] = pixels[half:]
    figure, panels = pyplot.subplots(len(strips), figsize=(8, 1.2 * len(strips)))
    for panel, (name, strip) in zip(panels, strips.items()):
        panel.imshow(strip)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.3)
    save(figure, path)


def save(figure, path, dpi=80):
    """Write a figure of matplotlib as PNG and forget it."""
    with runtime.atomic(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")
    curves.import_pyplot().close(figure)


def write_results(claims, paths, args):
    """Tables and drawings of all `claims` {name: claim} that have rows in their CSVs, `paths`."""
    tables = ["# The claims in numbers", "",
              "By `make claims`: mean ± standard deviation over seeds. `frechet`, `mind`, `precision`,",
              "`recall` and `agreement` are those of a small classifier trained in the run (tests/judge.py),",
              "not of Inception.", ""]
    figures = pathlib.Path(args.figures_dir)
    for name, claim in claims.items():
        rows = read_rows(claim, paths[name])
        yours = []
        if args.add and open(args.add).readline().strip() == ",".join(columns(claim)):
            yours = read_rows(claim, pathlib.Path(args.add))
        if rows:
            tables.append(table(name, claim, rows))
            draw(claim, [rows, yours], figures / f"{name}.png")
            if name != "losses":                             # of which README shows images
                draw(claim, [rows, yours], figures / f"{name}-small.png", small=True)
    losses = [setting["loss"] for setting in claims["losses"].settings]
    side_by_side(losses, pathlib.Path(args.runs_dir), figures / "losses-images.png")
    with runtime.atomic(pathlib.Path(args.csv_dir) / "claims.md") as temporary:
        temporary.write_text("\n".join(tables))
    print(f"tables: {args.csv_dir}/claims.md, figures: {args.figures_dir}/")
