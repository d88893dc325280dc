"""Reading lists of clips from Parquet, with pyarrow where it is installed (an extra: `[parquet]`)."""

from pathlib import Path
from typing import Any

from cogvideox_factory.data.rows import Row, Rows, choose_columns, table_row
from cogvideox_factory.errors import DataError, MissingError

_BATCH = 8192


def read_parquet(path: Path, *, caption_column: str, video_column: str, image_column: str | None = None) -> Rows:
    """Read the named columns of a Parquet table, a batch of rows at a time; other columns are not touched.

    Raises:
        MissingError: pyarrow is not installed.
        DataError: not readable, no Parquet, or a column is missing or there twice.
    """
    try:
        from pyarrow import ArrowException, parquet  # pyright: ignore[reportMissingImports], an extra
    except ImportError as error:
        raise MissingError(
            f"{path} is a Parquet table; reading it needs pyarrow. Install: pip install 'cogvideox-factory[parquet]', "
            "or save the table as .csv or .jsonl."
        ) from error
    rows: list[Row] = []
    try:
        with parquet.ParquetFile(path) as file:
            video_column, image_column, notes = choose_columns(
                path, file.schema_arrow.names, caption_column, video_column, image_column
            )
            columns = [caption_column, video_column, *([image_column] if image_column else [])]
            _require_text(path, file.schema_arrow, columns)
            for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
                for values in batch.to_pylist():
                    row = table_row(
                        len(rows) + 1, values, caption_column=caption_column, video_column=video_column,
                        image_column=image_column,
                    )  # fmt: skip
                    rows.append(row)
    except (OSError, ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}. Check the name, or write it again.") from error
    return Rows(rows=rows, notes=notes)


def _require_text(path: Path, schema: Any, names: list[str]) -> None:
    """Refuse columns that hold clips instead of naming them, before gigabytes of them are read."""
    from pyarrow import types  # pyright: ignore[reportMissingImports]

    for name in names:
        kind = schema.field(name).type
        if types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind):
            raise DataError(f"{path}: column {name!r} holds {kind}, not text. Save the clips as files and name them.")
