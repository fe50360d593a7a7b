"""Readers of labeled images: a folder, a table, a dataset folder of Hugging Face `datasets`, or scikit-learn's digits."""

import dataclasses
from pathlib import Path

from veneer.hub.names import is_repository
from veneer.hub.repo_files import download_dataset
from veneer.training.data.image_io import DataError

from .benchmark_layouts import benchmark_reader
from .csv_table import metadata_files, read_csv, read_metadata
from .digits import digits
from .hf_dataset import read_rows, row_files
from .image_folder import read_folder
from .labeled_images import SPLITS, Example, Source, Split

__all__ = ["SPLITS", "Example", "Source", "Split", "local_data", "open_source"]
_EXPECTED = (
    "a folder of CLASS/IMAGE or train/CLASS/IMAGE, a CSV of path,label[,split], a hub name USER/DATASET, or the word digits"
)


def open_source(data: str | Path | None = None, multi_label: bool = False) -> Source:
    """Opens labeled images without decoding them; see `check_images`.

    Args:
        data: one of
            - a folder of `CLASS/IMAGE`, or of train, validation and test folders with these: see `read_folder`;
            - a CSV, TSV or text table of path, label and optionally split: see `read_csv`;
            - a task of VTAB-1k or FGVC, or a dataset with CoOp's splits: see `benchmark_reader`;
            - a folder of the `datasets` library: images with `metadata.csv` or `metadata.jsonl` (`read_metadata`), Parquet files
              or `save_to_disk` (`read_rows`; needs pyarrow);
            - a dataset on the hub, `user/dataset`, that has such files, if there is no such path;
            - `digits`, or None: scikit-learn's 1,797 handwritten digits. A folder or file of that name is `./digits`.
        multi_label: images may have several labels, in the label column of a table; see `parse_labels`.

    Raises:
        DataError: the path does not exist, is of another kind, or has invalid contents; `multi_label`, and it is no table.
        HubError: the hub has no such dataset, or is unreachable.
    """
    if data is None or str(data) == "digits":
        return _single_label(digits(), multi_label)
    path = local_data(data)
    source = _open_path(path, multi_label)
    return source if path == Path(data).expanduser() else dataclasses.replace(source, where=Path(data).as_posix())


def local_data(data: str | Path) -> Path:
    """Local path of labeled images: the path itself, or the downloaded folder of a dataset on the hub.

    Raises:
        HubError: the hub has no such dataset, or is unreachable.
    """
    path = Path(data).expanduser()
    return path if not is_repository(data) else download_dataset(Path(data).as_posix())


def _single_label(source: Source, multi_label: bool) -> Source:
    """The source, if one label per image is expected."""
    if multi_label:
        message = (
            f"{source.where}: one label per image; expected a table with a label column for --multi-label: a CSV, or a folder "
            "with metadata.csv, metadata.jsonl or Parquet files. Leave out --multi-label."
        )
        raise DataError(message, file=source.where, where="labels", given="one label", expected="table")
    return source


def _open_path(path: Path, multi_label: bool) -> Source:
    """Opens a local file or folder; see `open_source`."""
    if path.is_file():
        if path.suffix.lower() not in (".csv", ".tsv", ".txt"):
            message = f"{path}: a file {f'with suffix {path.suffix}' if path.suffix else 'without suffix'}; expected {_EXPECTED}."
            raise DataError(message, file=path, where="suffix", given=path.suffix)
        return read_csv(path, multi_label)
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; expected {_EXPECTED}. Check the path.", file=path, given="missing")
    benchmark = benchmark_reader(path)
    if benchmark is not None:
        return _single_label(benchmark(path), multi_label)
    tables = metadata_files(path)
    if tables:
        return read_metadata(path, tables, multi_label)
    rows = row_files(path)
    return read_rows(path, rows, multi_label) if rows else _single_label(read_folder(path), multi_label)
