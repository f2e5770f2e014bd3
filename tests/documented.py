"""The commands that README.md and docs/ name, and a folder in which they run: tiny twins of their models, and
files in the layouts of their data, under the names that the docs use. Not a test itself."""

import json
import re
import shlex
import shutil
from pathlib import Path

import docs_sync
import pyarrow
from layouts import PICTURE, TEXT, TEXTS, cvbench_row, mathvista_row, png, shown, vsr_row, write, write_lines
from qwen import photograph, qwen_folder
from test_vlmeval import VERSE, picture, table
from tiny_recipes import data_of, overrides

import train
from data.sources import hub
from grpo.config import parse

# beside `tiny_recipes.overrides`
SMALL = {"steps": 1, "group": 2, "save.background": "false", "report.every": 0}
SMALL_EVALUATION = {"--items": 2, "--cap": 4, "--samples": 2, "--device": "cpu", "--max-pixels": 6272}
# recipes of runs that no command of the docs makes
RECIPES = {"mine": "own", "rl": "shapes", "sft": "shapes"}
BLINK = dict.fromkeys(("idx", "question", "sub_task", "answer", "prompt"), TEXT) | {"choices": TEXTS}
BLINK |= {f"image_{number}": PICTURE for number in (1, 2, 3, 4)}


def inline(path: Path) -> list[list[str]]:
    """The commands between backticks, with their arguments."""
    text = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"`((?:python|torchrun) [^`\n]+)`", text)
    # "[key=value ...]" says how a command is written
    split = (
        shlex.split(text.replace("url=…", "url=http://localhost/v1")) for text in found if "[" not in text
    )
    return [words for words in split if len(words) > 3 or words[1] == "train.py"]


def all_commands() -> list[tuple[str, ...]]:
    """Each command of the docs once."""
    pages = docs_sync.documents()
    return sorted({tuple(words) for page in pages for words in [*docs_sync.commands(page), *inline(page)]})


def recipe_of(name: str) -> str:
    """The recipe of the run runs/NAME: that of the command that makes it, else its own name."""
    for words in all_commands():
        if f"out=runs/{name}" in words:
            after = words[words.index("train.py") + 1]
            return "shapes" if "=" in after else after
    return RECIPES.get(name, name)


class Workplace:
    """A folder with everything that the docs' commands name."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "twins").mkdir()
        twins = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
        self.twins = {name: qwen_folder(folder / "twins" / name, name) for name in twins}
        for name in ("SAT", "vision_r1"):
            (folder / name).mkdir()
        (folder / "Qwen2-VL-2B").symlink_to(self.twins["qwen2_vl"])
        # the commands are typed in the clone
        (folder / "models").symlink_to(docs_sync.ROOT / "models")
        for name in ("photo.jpg", "left.jpg", "right.jpg"):
            (folder / name).write_bytes(photograph(1))
        (folder / "my.yaml").write_text("base: visualthinker_sat\nloss: {kl_coef: 0.1}\n")
        self.files = data_of(folder)
        lines = (folder / "mine" / "questions.jsonl").read_text().replace('"images/', '"mine/images/')
        (folder / "mine.jsonl").write_text(lines)
        for number in range(20):
            for place in ("coco", "train2017"):
                (folder / place).mkdir(exist_ok=True)
                (folder / place / f"{number:012}.jpg").write_bytes(png(number))
        cvbench = folder / "cvbench"
        for kind in ("2D", "3D"):
            rows = [cvbench_row(number, kind) for number in range(9)]
            write(cvbench / f"test_{kind.lower()}.parquet", "cvbench", rows)
        val = folder / "blink" / "Spatial_Relation" / "val-0.parquet"
        blink = write(val, pyarrow.schema(list(BLINK.items())), list(map(self.blink_row, range(20))))
        shutil.copytree(folder / "blink" / "Spatial_Relation", folder / "blink" / "Relative_Depth")
        vsr = write_lines(folder / "vsr" / "test.jsonl", [vsr_row(number) for number in range(20)])
        shutil.copy(vsr, folder / "vsr.jsonl")
        shutil.copy(folder / "SAT_train.parquet", folder / "SAT")
        shutil.copy(folder / "train.parquet", folder / "vision_r1")
        chains = next(self.files["vision_r1_cold"].glob("*.json"))
        vista = [mathvista_row(number) for number in range(9)]
        write(folder / "mathvista" / "testmini-0.parquet", "mathvista", vista)
        tables = self.tables(folder)
        # {task: the file or folder that a reader would have}; the built-in tasks have none
        self.files |= {"cvbench": cvbench, "blink": blink, "vsr": folder / "vsr.jsonl", "chains": chains}
        self.files |= dict.fromkeys(("shapes", "documents", "mathvista", "mathverse", "mm_math", "dynamath"))
        self.datasets = {
            "array/SAT": folder / "SAT",
            "nyu-visionx/CV-Bench": cvbench,
            "BLINK-Benchmark/BLINK": folder / "blink",
            "cambridgeltl/vsr_random": folder / "vsr",
            "Osilly/Vision-R1-rl": folder / "vision_r1",
            "AI4Math/MathVista": folder / "mathvista",
            "AI4Math/MathVerse": tables,
            "DynaMath/DynaMath_Sample": tables,
        }

    @staticmethod
    def tables(folder: Path) -> Path:
        """A folder with VLMEvalKit's tables, which also lie where the commands are typed."""
        (out := folder / "tables").mkdir()
        verse = VERSE | {"problem_version": "Text Lite", "metadata": str(VERSE["metadata"])}
        asked = {"question": "Find x.", "answer": "60"}
        maths = asked | {"difficulty": "easy", "year": "seven", "knowledge_l1": "Shapes"}
        dyna = asked | {"answer_type": "float", "subject": "algebra", "knowledge_level": "high school"}
        dyna |= {"varid": "1", "qid": "0"}
        for name, row in (("MathVerse_MINI", verse), ("MM-Math", maths), ("DynaMath", dyna)):
            rows = [row | {"index": str(number), "image": picture(number)} for number in range(9)]
            shutil.copy(table(out / f"{name}.tsv", rows), folder)
        return out

    @staticmethod
    def blink_row(number: int) -> dict:
        """One question about one picture."""
        asked = f"Question {number}?"
        row = {"idx": f"val_{number}", "question": asked, "sub_task": "Spatial_Relation", "answer": "(B)"}
        prompt = f"{asked}\nSelect from the following choices.\n(A) yes\n(B) no"
        return row | {"choices": ["yes", "no"], "prompt": prompt, "image_1": shown(number)[0]}

    def snapshot(self, repo: str, patterns, kind: str = "dataset", revision: str | None = None) -> Path:
        """In place of the hub's: the twin of a model, or the files of a dataset."""
        if kind == "dataset":
            if not hub.matching(self.datasets[repo], patterns):
                raise hub.NoMatch(f"{repo}: no file matches {patterns}")
            return self.datasets[repo]
        old = "qwen2_5_vl" if "Qwen2.5" in repo else "qwen2_vl"
        assert repo.startswith(("Qwen/Qwen", "AIcell/", "Osilly/")), f"no twin of {repo}"
        return self.twins["qwen3_vl" if "Qwen3" in repo else old]

    def run_of(self, name: str) -> Path:
        """The run folder runs/NAME, made by one step of its recipe."""
        if not (out := Path("runs") / name).exists() and name.startswith("bridge_"):
            out.mkdir(parents=True)
            rows = json.loads(self.files["chains"].read_text())
            shutil.copytree(self.files["vision_r1_cold"] / "mulberry_images", out / "mulberry_images")
            (out / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif not out.exists():
            recipe = recipe_of(name)
            own = ["model=tiny", "data=mine"] if recipe == "own" else []
            assert recipe in parse.recipes(), f"no recipe for runs/{name}"
            given = [recipe, f"out={out}", f"name={name}", "save.weights_every=1", *own]
            assert train.main(self.small(given)) == 0
            (out / "weights" / "step_000001").rename(out / "weights" / "step_000100")
        return out

    def small(self, argv: list[str]) -> list[str]:
        """A training command with less of everything that it does not say itself, and one step."""
        name = argv[0] if argv and "=" not in argv[0] else "shapes"
        cfg = parse.load(name)
        less = dict(word.split("=", 1) for word in overrides(name) if not word.startswith("rewards"))
        less |= SMALL | ({"cap": 8} if cfg.method == "grpo" else {})
        if cfg.data is None and self.files.get(cfg.task):
            less["data"] = self.files[cfg.task]
        # a run of thousands of steps is made short, too
        said = {word.partition("=")[0] for word in argv} - {"steps"}
        for word in argv:
            if word.startswith("loss.minibatches="):
                less["prompts"] = word.partition("=")[2]
        return [*argv, *(f"{key}={value}" for key, value in less.items() if key not in said)]

    def filled(self, words: list[str], task: str) -> list[str]:
        """The words with the reader's own file, folder and run in their places."""
        for name in set(re.findall(r"runs/(\w+)", " ".join(words))):
            if not any(word == f"out=runs/{name}" for word in words):
                self.run_of(name)
        file = str(self.files[task])
        words = ["model=Qwen2-VL-2B" if word == "model=FOLDER" else word for word in words]
        words = [re.sub(r"\b(FILE|FOLDER|PATH|DATA|PICTURES)\b…?", lambda _: file, word) for word in words]
        return [str(self.run_of("mine")) if word == "RUN" else word for word in words]


def small_evaluation(argv: list[str]) -> list[str]:
    """An evaluation of a few short answers."""
    less = dict(SMALL_EVALUATION)
    for key in ("--samples",) if "--samples" not in argv else ():
        del less[key]
    for key in ("--items", "--max-pixels") if {"--ask", "--chat"} & {*argv} else ():
        del less[key]
    return [*argv, *(str(word) for pair in less.items() for word in pair)]
