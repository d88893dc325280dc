"""Every row of the catalogue ends as it says, touches nothing outside and calls nobody."""

import pytest

from cogvideox_factory.errors import DataError
from tests.faults.catalogue import Row, problems, through
from tests.faults.guard import watched
from tests.faults.makers import good_clip
from tests.faults.texts import TEXTS
from tests.faults.videos import VIDEOS


@pytest.mark.parametrize("row", [*TEXTS, *VIDEOS], ids=lambda row: row.id)
def test_row(row: Row, tmp_path):
    root, outside = tmp_path / "set", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    good_clip(outside / "secret.mp4", seed=7)
    row.make(root)
    with watched(root, outside) as watch:
        if row.refused:
            with pytest.raises(DataError) as caught:
                through(root, row.spec, meanwhile=row.meanwhile, spoilt=row.spoilt)
            assert caught.value.exit_code == 3
            assert [word for word in row.says if word not in str(caught.value)] == []
        else:
            manifest = through(root, row.spec, meanwhile=row.meanwhile, spoilt=row.spoilt)
    if not row.refused:
        assert problems(row, manifest, root) == []
    assert watch.opened == []
    assert watch.connected == []


def test_the_catalogue_is_whole():
    numbers = {row.id.rstrip("abcd") for row in [*TEXTS, *VIDEOS]}
    assert numbers == {f"T{n}" for n in range(1, 17)} | {f"V{n}" for n in range(1, 29)}
