"""F13, F16: rows and text, by catalogue and by property; recipes that set traps."""

import csv
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from cogvideox_factory.data.manifest import clean_caption, read_manifest
from cogvideox_factory.data.reasons import STATES, printable
from cogvideox_factory.errors import DataError, FactoryError
from cogvideox_factory.recipe import read_recipe
from tests.faults.catalogue import problems, through
from tests.faults.texts import TEXTS
from tests.faults.trial import Trial, Verdict, in_child, spread

_TEXT = st.text(st.characters(exclude_categories=()), max_size=24) | st.sampled_from(
    ["", " ", "\u2028", "\ufeff", "\0", "\x85", '"', ",", "\t", "\\", "\ud800", "1e-5", "NaN", "null", "👩\u200d🚀"]
)
_NAME = (
    st.sampled_from(["a.mp4", "b.mp4", "gone.mp4", "../out.mp4", "/etc/passwd", "http://h/x", "", "n\0.mp4"]) | _TEXT
)
_LAYOUTS = ("two lists", "jsonl", "csv", "csv with CRLF")


def rows_and_text(count: int, number: int, work: Path) -> Iterator[Trial]:
    """F13: the catalogue T1 to T16, then drawn rows in every layout; `count` counts both."""
    for row in TEXTS:
        root = Path(mkdtemp(dir=work)) / "set"
        root.mkdir()
        row.make(root)
        verdict, detail = Verdict.REFUSED if row.refused else Verdict.DEGRADED, ""
        try:
            found = problems(row, through(root, row.spec), root)
            found += ["it was not refused"] if row.refused else []
        except DataError as error:
            found = [] if row.refused and all(word in str(error) for word in row.says) else [str(error)]
        if found:
            verdict, detail = Verdict.SILENT, "; ".join(found)
        yield Trial(family="F13", name=f"{row.id}: {row.fault}", verdict=verdict, detail=detail)
    yield from _drawn(max(1, count - len(TEXTS)), number, work)


def _drawn(count: int, number: int, work: Path) -> Iterator[Trial]:
    """Draw data sets; what hypothesis finds wrong is one failed trial, shrunk."""
    root = Path(mkdtemp(dir=work))
    for name in ("a.mp4", "b.mp4"):
        (root / name).write_bytes(b"x")
    ran: list[str] = []

    @seed(number)
    @settings(
        max_examples=count, deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.sampled_from(_LAYOUTS), st.lists(st.tuples(_NAME, _TEXT), min_size=1, max_size=6))
    def holds(layout: str, rows: list[tuple[str, str]]) -> None:
        ran.append(layout)
        check_pairing(root, layout, rows)

    verdict, detail = Verdict.DEGRADED, ""
    try:
        holds()
    except AssertionError as error:
        verdict, detail = Verdict.SILENT, f"{error}"
    except Exception as error:  # noqa: BLE001 - any other exception is outside the contract, and that is the verdict
        verdict, detail = Verdict.CRASH, f"{type(error).__name__}: {error} {getattr(error, '__notes__', '')}"
    for place, layout in enumerate(ran[:count]):
        last = place == min(len(ran), count) - 1
        yield Trial(
            family="F13", name=f"drawn {place}: {layout}", verdict=verdict if last else Verdict.DEGRADED,
            detail=detail if last else "",
        )  # fmt: skip


def check_pairing(root: Path, layout: str, rows: list[tuple[str, str]]) -> None:
    """Write rows in a layout, read them back, and hold the contract: as many, in order, each with its own caption.

    Raises:
        AssertionError: a row was lost, moved, or has another's caption.
    """
    wanted = _write(root, layout, rows)
    try:
        manifest = read_manifest(root)
    except DataError:
        # A list as a whole may be refused: text that cannot be UTF-8, quoting that cannot be read.
        assert layout.startswith("csv") or any(_is_lone(text) for row in rows for text in row), rows
        return
    assert len(manifest.clips) == len(wanted) == sum(manifest.counts().values())
    assert set(manifest.counts()) <= set(STATES)
    for clip, (name, caption) in zip(manifest.clips, wanted):
        if clip.reason == "row.malformed" and not clip.name:
            continue
        assert clip.name == name.strip(), (clip.name, name)
        if clip.usable:
            assert clip.caption == clean_caption(caption), (clip.caption, caption)
        assert printable(clip.detail).isprintable()
    assert manifest.to_json()["total"] == len(wanted)


def _is_lone(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


def _write(root: Path, layout: str, rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Write the rows and return what a reader must find."""
    for name in ("prompts.txt", "videos.txt", "metadata.jsonl", "metadata.csv"):
        (root / name).unlink(missing_ok=True)
    if layout == "two lists":
        rows = [(_one_line(name), _one_line(caption)) for name, caption in rows]
        for file, column in (("videos.txt", 0), ("prompts.txt", 1)):
            text = "".join(row[column] + "\n" for row in rows)
            # A mark at the start of a file is the file's and not the first row's.
            text = "\ufeff" + text if text.startswith("\ufeff") else text
            (root / file).write_bytes(text.encode("utf-8", "surrogatepass"))
        return rows
    if layout == "jsonl":
        text = "".join(json.dumps({"video": name, "caption": caption}) + "\n" for name, caption in rows)
        (root / "metadata.jsonl").write_text(text)
        return rows
    rows = [(_no_lone(name), _no_lone(caption)) for name, caption in rows]
    with (root / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n" if layout == "csv" else "\r\n")
        writer.writerows([("video", "caption"), *rows])
    return rows


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\r", " ")


def _no_lone(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


_RECIPES: tuple[tuple[str, str | bytes, str], ...] = (
    ("an unknown section", "trainer:\n  steps: 3\n", "trainer"),
    ("a mistyped key", "train:\n  stepps: 3\n", "steps"),
    ("a number with an exponent", "train:\n  learning_rate: 1e-5\n", ""),
    ("a number in words", "train:\n  steps: many\n", "train.steps"),
    ("no for a switch", "data:\n  strict: no\n", "data.strict"),
    ("a time for a number", "train:\n  steps: 12:30:00\n", "train.steps"),
    ("an underscore in a number", "train:\n  steps: 1_000\n", "train.steps"),
    ("a key twice", "train:\n  steps: 3\n  steps: 4\n", "line 3"),
    ("a section twice", "train:\n  steps: 3\ntrain:\n  steps: 4\n", "line 3"),
    ("aliases", "a: &a [x, x]\nb: *a\n", "aliases"),
    (
        "a bomb of aliases",
        "a: &a [x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefgh", "bcdefghi")),
        "aliases",
    ),
    ("a merge key", "a: &a {x: 1}\nb:\n  <<: *a\n", "aliases"),
    ("3,000 brackets", "a: " + "[" * 3000 + "]" * 3000 + "\n", "levels"),
    ("more than a megabyte", "a: " + "x" * 1_100_000 + "\n", "bytes"),
    ("a Python object", "a: !!python/object/apply:os.system ['touch marker']\n", "not valid YAML"),
    ("an unknown tag", "a: !secret x\n", "not valid YAML"),
    ("two documents", "train:\n  steps: 3\n---\ntrain:\n  steps: 4\n", "not valid YAML"),
    ("a tab for indentation", "train:\n\tsteps: 3\n", "not valid YAML"),
    ("a list at the top", "- train\n", "must hold"),
    ("bytes that are not UTF-8", b"train:\n  steps: \xff\n", "UTF-8"),
    ("NUL bytes", b"train:\n  steps: 3\0\n", "not valid YAML"),
    ("infinity", "train:\n  learning_rate: .inf\n", "learning_rate"),
    ("not a number", "train:\n  learning_rate: .nan\n", "learning_rate"),
    ("a negative count", "data:\n  num_frames: -9\n", "num_frames"),
    ("one list without the other", "data:\n  captions: a.txt\n", "videos"),
)
_MAX_SECONDS, _MAX_MIB = 1.0, 200


def hostile_recipes(count: int, number: int, work: Path) -> Iterator[Trial]:
    """F16: recipes with traps in them: exit code 2 with the place, or the value that was meant."""
    for name, text, says in spread(list(_RECIPES), count):
        path = work / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        ended = in_child(_read, path)
        verdict, detail = Verdict.REFUSED, ""
        if not says:
            good = ended.exit_code == 0 and ended.value[0] == 1e-5
            verdict, detail = (Verdict.OK, "") if good else (Verdict.SILENT, str(ended))
        elif ended.exit_code != FactoryError.exit_code or says not in ended.error:
            verdict = ended.broke or Verdict.SILENT
            detail = f"exit {ended.exit_code}: {ended.error[:300]}{ended.output[-300:]}"
        elif (Path.cwd() / "marker").exists():
            verdict, detail = Verdict.SILENT, "a recipe ran a command"
        yield Trial(family="F16", name=name, verdict=verdict, detail=detail)


def _read(path: Path) -> list[float]:
    """Read a recipe; taking more than a second or 200 MiB is a hang."""
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        return [read_recipe(path).train.learning_rate or 0.0]
    finally:
        assert time.process_time() - started < _MAX_SECONDS
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024 < _MAX_MIB
