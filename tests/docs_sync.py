"""Docs are executed: `python -m tests.docs_sync` rewrites every quoted piece of code and every generated
table in README.md and docs/.

A marker above a fenced block quotes a function, class, method or constant. With `from` and `to` it quotes the
lines from one that holds the first text up to the next that holds the second. A table is generated between
two markers, by one of GENERATORS:

    <!-- code: grpo/objective.py:group_advantages -->

    <!-- code: train.py:train_grpo from "# 1" to "# 2" -->

    <!-- generated: settings loss. -->   ...   <!-- end -->

tests/test_docs.py fails where a doc differs from what this would write.
"""

import ast
import html
import re
import shlex
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.result_tables import results

QUOTED = re.compile(
    r'^<!-- code: (?P<path>[\w./]+)(?::(?P<name>[\w.]+))?(?: from "(?P<first>[^"\n]+)")?(?: to '
    r'"(?P<last>[^"\n]+)")? -->\n'
    r"(?P<fence>```\w*\n)(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
GENERATED = re.compile(
    r"^<!-- generated: (?P<what>\w+)(?: (?P<argument>\S+))? -->\n(?P<body>.*?)^<!-- end -->$",
    re.MULTILINE | re.DOTALL,
)


def documents() -> list[Path]:
    """README.md, CONTRIBUTING.md and everything below docs/."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(path: Path) -> list[list[str]]:
    """Every command of a document's bash blocks, split into words."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    split = (shlex.split(part, comments=True) for line in lines for part in line.split("&&"))
    return [words for words in split if words]


def source_of(path: str, name: str | None = None, first: str | None = None, last: str | None = None) -> str:
    """The text a `code` marker stands for. Raises ValueError where the source has no such thing."""
    text = (ROOT / path).read_text("utf-8")
    lines = text.splitlines(keepends=True)
    if name is not None:
        node = ast.parse(text)
        for part in name.split("."):
            node = next((child for child in node.body if part in _names(child)), None)
            if node is None:
                raise ValueError(f"{path} has no {name}")
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        lines = lines[start - 1 : node.end_lineno]
    if first is not None:
        at = next((i for i, line in enumerate(lines) if first in line), None)
        if at is None:
            raise ValueError(f"{path}:{name} has no line with {first!r}")
        lines = lines[at:]
    if last is not None:
        to = next((i for i, line in enumerate(lines) if i and last in line), None)
        if to is None:
            raise ValueError(f"{path}:{name} has no later line with {last!r}")
        lines = lines[:to]
    return textwrap.dedent("".join(lines)).strip("\n") + "\n"


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]


# ---- generated tables


def settings(prefix: str | None) -> str:
    """The settings whose key starts with `prefix`; without one all of them, under their headings."""
    from grpo.config.parse import markdown_table
    from grpo.config.settings import HEADINGS, Config, Stage
    from grpo.config.typed import field_help, leaves

    if prefix:
        return markdown_table(prefix) + "\n"
    header, rule, *rows = markdown_table().splitlines()
    text = ""
    for key, row in zip(leaves(Config), rows):
        if (heading := HEADINGS.get(key.partition(".")[0])) and f"## {heading}\n" not in text:
            text += f"\n## {heading}\n\n{header}\n{rule}\n"
        text += row + "\n"
    stage = "".join(f"| `{name}` | {words} |\n" for name, words in field_help(Stage).items())
    intro = (
        "## A stage\n\nAn entry of `stages`. All three keys must be given.\n\n| key | meaning |\n|---|---|\n"
    )
    return f"{text}\n{intro}{stage}".lstrip("\n")


def bridge_settings(_) -> str:
    """The settings of the bridge. Stages have the same, and so have its two writers."""
    from grpo.bridge.settings import Settings
    from grpo.config.parse import markdown_table

    lines = markdown_table(cls=Settings).splitlines(keepends=True)
    repeated = ("| `describe.", "| `reason.", "| `reasoner.")
    return "".join(line for line in lines if not line.startswith(repeated)) + "\n"


def recipes(_) -> str:
    """What --list prints, as a table."""
    from grpo.config.parse import recipes

    rows = (f"| [`{name}`](grpo/recipes/{name}.yaml) | {about} |\n" for name, about in recipes().items())
    return "| recipe | what it is for |\n|---|---|\n" + "".join(rows)


def mixture(_) -> str:
    """The documents that the base model has read: what share shows which behaviour, from the constants of
    data/shapes/documents.py."""
    from data.shapes.documents import AGAIN, CARELESS, MALFORMED, POLITE, TERSE
    from data.shapes.looking import SECOND_LOOKS

    looking = 1 - TERSE
    rows = [
        (
            "terse: an answer and nothing else",
            TERSE * (1 - POLITE),
            "the letter is drawn evenly: right by chance only",
        ),
        ("terse and polite, as an instruct model", TERSE * POLITE, "the same"),
        ("looks once, carefully", looking * (1 - AGAIN) * (1 - CARELESS), "right"),
        (
            "looks once, carelessly",
            looking * (1 - AGAIN) * CARELESS,
            "wrong: what was read leads to another choice",
        ),
        ("looks again after a careful look", looking * AGAIN * (1 - CARELESS), "right, twice"),
        (
            "looks again after a careless look",
            looking * AGAIN * CARELESS,
            "right: the second look is always careful",
        ),
    ]
    body = "".join(f"| {name} | {100 * share:.1f} % | {end} |\n" for name, share, end in rows)
    phrases = ", ".join(f"`{phrase}` ({100 * share:g} %)" for phrase, share in SECOND_LOOKS.items())
    return (
        f"| behaviour | share of the documents | its answer |\n|---|---|---|\n{body}"
        f"| malformed, across all of the above | {100 * MALFORMED:.1f} % | a tag is missing, or markup "
        f"trails behind |\n\nA second look begins with {phrases}.\n"
    )


def world(_) -> str:
    """The built-in world: its constants, and what 100 items of each task show."""
    from math import hypot

    from data.shapes.world import CHANCE, COLORS, GRID, PAIRS, SHAPES, SIDE, SIZES, TASKS, UNSEEN_PAIRS, item

    def margin(task, about):
        x, *others = about["named"]
        if task == "Relation":
            return abs(getattr(x, about["axis"]) - getattr(others[0], about["axis"]))
        if task == "Depth":
            return abs(x.size - others[0].size)
        return abs(hypot(x.x - others[0].x, x.y - others[0].y) - hypot(x.x - others[1].x, x.y - others[1].y))

    units, rows, objects, alike = (
        {"Relation": "cells", "Depth": "sizes", "Distance": "cells of distance"},
        "",
        set(),
        False,
    )
    for number, task in enumerate(TASKS):
        items = [item("heldout", 0, index) for index in range(number, 400, len(TASKS))]
        objects |= {len(scene) for scene, _ in items}
        alike |= any(len({thing.color for thing in scene}) < len(scene) for scene, _ in items)
        least = (
            "exact"
            if task == "Count"
            else f"at least {min(margin(task, example.extra) for _, example in items):.0f} {units[task]}"
        )
        if least.endswith(" 1 sizes"):
            least = least.replace("sizes", "size")
        rows += (
            f"| {task} | {items[0][1].question} | {len(items[0][1].choices)} | {100 * CHANCE[task]:.0f} % | "
            f"{least} |\n"
        )
    colours = f"{len(COLORS)} colours{'' if alike else ' (no two in a picture are alike)'}"
    return (
        f"A picture has {SIDE} × {SIDE} pixels and holds {min(objects)} to {max(objects)} objects. "
        f"An object has one of {colours}, one of {len(SHAPES)} shapes, a place on a {GRID} × {GRID} grid and "
        f"one of {SIZES} sizes. "
        f"{len(UNSEEN_PAIRS)} of the {len(PAIRS)} colour-shape pairs are held back. "
        f"Chance over all tasks is {100 * sum(CHANCE.values()) / len(CHANCE):g} %.\n\n"
        "| task | a question | choices | chance | the answer follows from the geometry by "
        f"|\n|---|---|---|---|---|\n{rows}"
    )


def documents_shown(_) -> str:
    """Of the base model's documents the first of each sort, part by part."""
    from data.shapes.documents import PARTS, Documents
    from data.shapes.looking import LOOK, SECOND_LOOKS

    def sort_of(task: str, text: str) -> str:
        if task.startswith(("Caption", "Lesson", "Letter")):
            return task if "," in text else "a caption of one object"
        if "</think> <answer>" not in text or not text.endswith("</answer>"):
            return "malformed"
        second = next((phrase for phrase in SECOND_LOOKS if phrase in text), None)
        return second or (task if LOOK in text else "polite" if "!" in text else "terse")

    shown, start = "", 0
    documents = Documents(seed=0)
    for number, part in enumerate(PARTS, 1):
        first: dict[str, str] = {}
        for example in (documents[start + i] for i in range(600)):
            for text in example.extra["documents"]:
                first.setdefault(sort_of(example.task, text), f"{example.question}\n    {text}\n")
        shown += f"part {number}\n" + "".join(first[sort] for sort in sorted(first))
        start = part.until
    return f"```\n{shown}```\n"


def sizes(_) -> str:
    """The built-in model beside Qwen2-VL-2B, whose figures are those of its config.json on the hub."""
    from models.config import ModelConfig

    c = ModelConfig.from_folder(ROOT / "models" / "tiny")
    v = c.vision
    rows = [
        ("vision tower: blocks × width, heads", f"{v.depth} × {v.width}, {v.num_heads}", "32 × 1,280, 16"),
        ("decoder: blocks × width", f"{c.num_hidden_layers} × {c.hidden_size}", "28 × 1,536"),
        (
            "query heads / key heads × head size",
            f"{c.num_attention_heads} / {c.num_key_value_heads} × {c.head_size}",
            "12 / 2 × 128",
        ),
        ("M-RoPE sections: time, height, width", ", ".join(map(str, c.mrope_section)), "16, 24, 24"),
        ("vocabulary", f"{c.vocab_size:,}", "151,936"),
        ("head tied to the embedding", "yes" if c.tie_word_embeddings else "no", "yes"),
    ]
    return "| | built-in | Qwen2-VL-2B |\n|---|---|---|\n" + "".join(
        f"| {' | '.join(row)} |\n" for row in rows
    )


def shards(_) -> str:
    """Bytes a rank holds of a policy, its reference, gradients and moments, and what it gathers, in
    bfloat16; from the plan."""
    from grpo.config import parse
    from grpo.plan import known_models, plan

    def cells(name: str, ranks: int) -> tuple[str, str, str]:
        found = plan.make_plan(
            parse.load("visualthinker_sat", ["dtype=bfloat16"]), known_models.KNOWN[name], ranks=ranks
        )
        sizes = {
            item.name: item.bytes
            for stage in found.stages[:1]
            # gradients are whole in the update
            for moment in ("in the last block", "in the update")
            for item in (*found.held, *stage.rollout, *stage.learning[moment])
        }
        held = sum(sizes[part] for part in ("weights", "optimizer", "reference", "gradients"))
        gathered = (
            sizes.get("gathered policy", 0),
            sizes.get("gathered parts", 0) + sizes["bfloat16 copies"],
        )
        return tuple(f"{size / 2**30:.1f} GiB" for size in (held, *gathered))

    rows = "".join(
        f"| {name.partition('/')[2]} | {ranks} | {' | '.join(cells(name, ranks))} |\n"
        for name in ("Qwen/Qwen2-VL-2B", "Qwen/Qwen2.5-VL-7B-Instruct")
        for ranks in (1, 8, 64)
    )
    return (
        "| model | GPUs | held all the time | gathered to sample | copies and gathered parts while "
        "learning |\n|---|---|---|---|---|\n"
    ) + rows


def by_model(_) -> str:
    """What the recipe own chooses for each known model, and the peak of its plan."""
    from grpo.config import parse, value_of
    from grpo.plan import known_models, plan

    keys = ("template", "optim.lr", "cap", "max_prompt", "max_pixels", "max_rows")
    text = "| model | trained | " + " | ".join(f"`{key}`" for key in keys) + " | peak (`--plan`) |\n"
    text += "|---|---|" + "---|" * (len(keys) + 1) + "\n"
    for model in ("tiny", *known_models.KNOWN):
        # all weights: of the recipe's own model
        for rank in ("", "lora.rank=0") if model == parse.load("own").model else ("",):
            cfg = parse.load("own", [f"model={model}", *filter(None, [rank])])
            peak = plan.text(cfg).partition("peak: ")[2].partition("\n")[0]
            trained = f"adapters, rank {cfg.lora.rank}" if cfg.lora.rank else "all weights"
            values = [value_of(cfg, key) for key in keys]
            shown = " | ".join("-" if value is None else f"`{value}`" for value in values)
            text += f"| `{model.rpartition('/')[2]}` | {trained} | {shown} | {peak} |\n"
    return text


def needs(prefix: str) -> str:
    """What the recipes of 7 B parameters whose names begin with `prefix` need, at most; from the plan. An
    epoch of Vision-R1-cold has 260,994 chains."""
    from grpo.config import parse
    from grpo.plan import known_models, plan

    heads = "recipe", "steps", "completions, or chains", "peak on 1, 8 and 32 GPUs", "arithmetic"
    text = f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n"
    for name in (name for name in parse.recipes() if name.startswith(prefix)):
        cfg = parse.load(name)
        model = known_models.KNOWN[cfg.model]
        stages = plan.make_plan(cfg, model).stages
        steps = [stage.last - stage.first + 1 for stage in stages]
        if cfg.epochs:
            steps = [-(-int(cfg.epochs * 260_994) // cfg.prompts)]
        group = [stage.group * cfg.prompts for stage in stages]
        each = ", then ".join(f"{rows:,} x {stage.cap:,}" for rows, stage in zip(group, stages, strict=True))
        peaks = (plan.make_plan(cfg, model, ranks=ranks).peak / 2**30 for ranks in (1, 8, 32))
        flops = sum(count * stage.flops for count, stage in zip(steps, stages)) / 1e15
        cells = f"`{name}`", f"{sum(steps):,}", each, " / ".join(f"{peak:,.0f}" for peak in peaks) + " GiB"
        text += f"| {' | '.join(cells)} | {flops:,.0f} PFLOP |\n"
    return text


def adversarial(_) -> str:
    """Answers that fool checkers, with the verdict of every rule; test_numbers.py asserts each."""
    from tests.data.answers.adversarial import CASES

    def cell(text: str) -> str:
        return (
            f"<code>{html.escape(text).replace('|', '&#124;')}</code>".replace("\n", "↵")
            if text
            else "*(nothing)*"
        )

    text = ""
    for heading, cases in CASES.items():
        name, _, about = heading.partition("; ")
        text += (
            f"### {name}\n\n"
            + (f"{about[0].upper()}{about[1:]}.\n\n" if about else "")
            + (
                "| said | right answer | `accuracy` | `accuracy_math_verify` | `accuracy_paper` | "
                "`accuracy_paper_math_verify` |\n|---|---|---|---|---|---|\n"
            )
        )
        for case in cases:
            said = case.shown or cell(case.said if case.text is None else case.text)
            verdicts = " | ".join(
                "**right**" if verdict else "wrong"
                for verdict in (case.accuracy, case.math, case.paper, case.paper_math)
            )
            text += f"| {said} | {cell(case.gold)} | {verdicts} |\n"
        text += "\n"
    return text.rstrip("\n") + "\n"


def readme(heading: str) -> str:
    """The fenced block below a heading of the README."""
    text = (ROOT / "README.md").read_text("utf-8")
    return re.search(rf"^## [^\n]*{heading}[^\n]*$.*?^(```\n.*?^```\n)", text, re.MULTILINE | re.DOTALL)[1]


def tree(_) -> str:
    """Every module of the program with the first sentence of its docstring, folder by folder."""
    text = ""
    for folder in ("grpo", "models", "data"):
        for path in sorted((ROOT / folder).rglob("*.py"), key=lambda path: (path.parent, path.name)):
            if path.name == "__init__.py":
                continue
            if (heading := f"**`{path.parent.relative_to(ROOT)}/`**") not in text:
                text += f"\n{heading}\n\n| file | what it does |\n|---|---|\n"
            about = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n\n")[0]
            about = re.split(r"[.:](?: |$)", " ".join(about.split()))[0].replace("|", "&#124;")
            text += f"| `{path.name}` | {about} |\n"
    return text.lstrip("\n")


GENERATORS = {
    "tree": tree,
    "settings": settings,
    "bridge_settings": bridge_settings,
    "recipes": recipes,
    "mixture": mixture,
    "world": world,
    "documents": documents_shown,
    "sizes": sizes,
    "shards": shards,
    "by_model": by_model,
    "needs": needs,
    "adversarial": adversarial,
    "readme": readme,
    "results": results,
}


def synced(text: str) -> str:
    """A document as it should be."""

    def quoted(match: re.Match) -> str:
        body = source_of(match["path"], match["name"], match["first"], match["last"])
        return match[0][: match.start("body") - match.start()] + body + "```"

    def generated(match: re.Match) -> str:
        return (
            match[0][: match.start("body") - match.start()]
            + GENERATORS[match["what"]](match["argument"])
            + "<!-- end -->"
        )

    return GENERATED.sub(generated, QUOTED.sub(quoted, text))


def main() -> None:
    """Rewrite what differs; list the places that still wait for a measured number."""
    for path in documents():
        text = path.read_text("utf-8")
        if (new := synced(text)) != text:
            path.write_text(new, "utf-8")
            print(f"rewrote {path.relative_to(ROOT)}")
        waiting = re.findall(r"<!-- result: ([\w-]+)", new)
        if waiting:
            print(f"{path.relative_to(ROOT)} waits for {', '.join(waiting)}")


if __name__ == "__main__":
    main()
