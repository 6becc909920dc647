"""Who leads and who is owned: properties of the choice on random maps, against a comparison of all pairs."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mitigate.errors import UnsupportedModel
from mitigate.ops.spatial import NEIGHBOURHOODS, OWNERSHIPS, Raster, Tile, arrange, choose, neighbours, stitch
from tests.references import naive_scr

#: Rank values of the hand-made 5x5 grid; the border holds the largest and must never become a source.
GRID = [9, 9, 9, 9, 9, 9, 5, 3, 2, 9, 9, 4, 6, 1, 9, 9, 0.5, 0.7, 0.9, 9, 9, 9, 9, 9, 9]
FIVE = Raster(tuple(range(25)), (5, 5))


def on_grid(k, **options):
    return choose(dict(enumerate(GRID)), [FIVE], k, **options)


def owned(owners, source):
    return sorted(patch for patch, owner in owners.items() if owner == source)


@st.composite
def maps(draw):
    """One to three rasters of unequal sides, numbered with gaps, with a map that has ties."""
    grids = draw(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=3))
    rasters, first = [], draw(st.integers(0, 50))
    for rows, columns in grids:
        rasters.append(Raster(tuple(range(first, first + rows * columns)), (rows, columns)))
        first += rows * columns + 2
    patches = [patch for raster in rasters for patch in raster.patches]
    values = st.integers(0, 9) if draw(st.booleans()) else st.floats(0, 1, width=32)
    rank = draw(st.lists(values, min_size=len(patches), max_size=len(patches)))
    return rasters, dict(zip(patches, map(float, rank), strict=True))


options = st.fixed_dictionaries(
    {
        "ownership": st.sampled_from(OWNERSHIPS),
        "neighbourhood": st.sampled_from(sorted(NEIGHBOURHOODS)),
        "exclude_border": st.booleans(),
    }
)


@given(maps(), st.integers(1, 40), options)
def test_choice_equals_brute_force(drawn, k, option):
    rasters, rank = drawn
    spots = {
        patch: naive_scr.Spot(0, number, *divmod(place, raster.grid[1]), *raster.grid)
        for number, raster in enumerate(rasters)
        for place, patch in enumerate(raster.patches)
    }
    assert choose(rank, rasters, k, **option) == naive_scr.choose_among(spots, rank, k, **option)


@given(maps(), st.integers(1, 40), options)
def test_roles_are_exclusive_and_owners_are_the_strongest(drawn, k, option):
    rasters, rank = drawn
    sources, owners = choose(rank, rasters, k, **option)
    assert len(sources) == len(set(sources)) <= k
    assert sources == sorted(sources, key=lambda patch: (-rank[patch], patch))
    assert not owners.keys() & set(sources)
    adjacent = {}
    for raster in rasters:
        for place, patch in enumerate(raster.patches):
            near = neighbours(place, raster.grid, option["neighbourhood"])
            adjacent[patch] = {raster.patches[other] for other in near}
            row, column = divmod(place, raster.grid[1])
            if option["exclude_border"] and patch in sources:
                assert 0 < row < raster.grid[0] - 1
                assert 0 < column < raster.grid[1] - 1
    most = {"8": 8, "4": 4, "radius2": 24}[option["neighbourhood"]]
    for source in sources:
        assert len(owned(owners, source)) <= most
        assert adjacent[source] <= owners.keys() | set(sources), "every neighbour of a source has a role"
    for patch, owner in owners.items():
        rivals = [source for source in sources if source in adjacent[patch]]
        assert rank[owner] == max(rank[source] for source in rivals)
        assert owner in rivals


@given(maps(), options)
def test_more_sources_than_candidates_means_all_of_them(drawn, option):
    rasters, rank = drawn
    everyone = choose(rank, rasters, 10_000, **option)
    assert everyone == choose(rank, rasters, len(rank) + 1, **option)
    if option["ownership"] == "topk_then_exclude" and option["exclude_border"]:
        inner = sum(max(r.grid[0] - 2, 0) * max(r.grid[1] - 2, 0) for r in rasters)
        assert len(everyone[0]) == inner


def test_hand_made_grid():
    sources, owners = on_grid(2)
    assert sources == [12, 6]
    assert owned(owners, 12) == [7, 8, 11, 13, 16, 17, 18]
    assert owned(owners, 6) == [0, 1, 2, 5, 10]
    assert len(owners) == 12
    sources, owners = on_grid(3)
    assert sources == [12, 6, 11]
    assert owned(owners, 12) == [7, 8, 13, 16, 17, 18]
    assert len(owned(owners, 6)) == 5
    assert owned(owners, 11) == [15]


def test_hand_made_grid_with_suppression():
    sources, owners = on_grid(2, ownership="greedy_nms")
    assert sources == [12]
    assert owned(owners, 12) == [6, 7, 8, 11, 13, 16, 17, 18]


def test_hand_made_grid_with_other_neighbourhoods():
    sources, owners = on_grid(2, neighbourhood="4")
    assert sources == [12, 6]
    assert owned(owners, 12) == [7, 11, 13, 17]
    assert owned(owners, 6) == [1, 5]
    sources, owners = on_grid(1, neighbourhood="radius2")
    assert sources == [12]
    assert len(owned(owners, 12)) == 24


def test_hand_made_grid_with_its_border():
    sources, owners = on_grid(2, exclude_border=False)
    assert sources == [0, 1], "ties go to the earlier patch"
    assert owned(owners, 0) == [5, 6]
    assert owned(owners, 1) == [2, 7]


@pytest.mark.parametrize("grid", [(2, 4), (1, 9), (5, 2)])
@pytest.mark.parametrize("exclude_border", [True, False])
def test_grid_with_a_short_side_stays_as_it_is(grid, exclude_border):
    patches = tuple(range(grid[0] * grid[1]))
    flat = Raster(patches, grid)
    assert flat.degenerate
    assert choose(dict.fromkeys(patches, 1.0), [flat], 3, exclude_border=exclude_border) == ([], {})


def test_patches_that_are_not_numbers_come_last():
    rank = dict(enumerate(map(float, GRID))) | {12: float("nan")}
    assert choose(rank, [FIVE], 9)[0] == [6, 11, 7, 8, 13, 18, 17, 16, 12]


def tiles_2x2():
    """Four tiles of unequal size and a thumbnail, numbered one after the other."""
    grids = {(0, 0): (2, 3), (0, 1): (2, 4), (1, 0): (3, 3), (1, 1): (3, 4)}
    tiles, first = [], 0
    for place, (rows, columns) in grids.items():
        tiles.append(Tile(Raster(tuple(range(first, first + rows * columns)), (rows, columns)), place))
        first += rows * columns
    return [*tiles, Tile(Raster(tuple(range(first, first + 9)), (3, 3)), thumbnail=True)]


def test_stitched_tiles_lie_side_by_side():
    (joined, thumbnail), *others = arrange(tiles_2x2(), "stitched")
    assert others == []
    assert joined.grid == (5, 7)
    assert joined.patches[:7] == (0, 1, 2, 6, 7, 8, 9)
    assert joined.patches[14:21] == (14, 15, 16, 23, 24, 25, 26)
    assert sorted(joined.patches) == list(range(35))
    assert thumbnail.patches == tuple(range(35, 44))


def test_tiles_that_the_model_has_joined_stay_as_they_are():
    _, joined, *_, thumbnail = tiles_2x2()
    joined = Tile(joined.raster)
    assert arrange([thumbnail, joined], "stitched") == [[joined.raster, thumbnail.raster]]


def test_other_arrangements():
    tiles = tiles_2x2()
    rasters = [tile.raster for tile in tiles]
    assert arrange(tiles, "pooled") == [rasters]
    assert arrange(tiles, "per_tile_k") == [[raster] for raster in rasters]
    assert arrange(tiles, "thumbnail_only") == [[rasters[-1]]]
    for mode in ("pooled", "per_tile_k", "stitched", "thumbnail_only"):
        assert arrange(tiles[:1], mode) == [[rasters[0]]], "a picture in one piece is its own thumbnail"


@pytest.mark.parametrize("broken", ["gap", "unknown", "uneven"])
def test_tiles_that_do_not_fit_are_not_stitched(broken):
    tiles = tiles_2x2()[:4]
    if broken == "gap":
        tiles.pop()
    elif broken == "unknown":
        tiles[1] = Tile(tiles[1].raster)
    else:
        tiles[1] = Tile(Raster(tiles[1].raster.patches, (4, 2)), (0, 1))
    with pytest.raises(UnsupportedModel, match="tile_mode=pooled"):
        stitch(tiles)


def test_a_picture_in_tiles_without_thumbnail_has_no_thumbnail():
    with pytest.raises(UnsupportedModel, match="no thumbnail"):
        arrange(tiles_2x2()[:4], "thumbnail_only")


def test_neighbourhoods_by_distance():
    for kind, (place, grid) in itertools.product(NEIGHBOURHOODS, [(0, (4, 9)), (17, (4, 9)), (35, (7, 7))]):
        row, column = divmod(place, grid[1])
        spot = naive_scr.Spot(0, 0, row, column, *grid)
        expected = [
            other
            for other in range(grid[0] * grid[1])
            if naive_scr.touch(spot, naive_scr.Spot(0, 0, *divmod(other, grid[1]), *grid), kind)
        ]
        assert neighbours(place, grid, kind) == expected
