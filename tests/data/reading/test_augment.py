"""Single-turn pairs of UltraInteract trees: the paper's rules checked on random trees, by brute force."""

import itertools
import json
import random
from collections import Counter

import pytest
import reading

from benchmarks import ultrainteract
from silva.engine.data.reading.augment import single_turn_pairs
from silva.engine.data.report import Report
from silva.engine.errors import UserError
from silva.engine.recipe.schema import Source


def tree_rows(name, depth, rng=None, words=""):
    """One trajectory of `depth` turns: the row of turn t continues the rejected actions of the turns before."""
    said = [{"from": "user", "value": f"instruction {name}"}]
    rows = []
    for turn in range(1, depth + 1):
        chosen, rejected = f"right {words}{turn}", f"wrong {words}{turn}"
        if rng and rng.random() < 0.3:
            rejected = f"wrong {words}{rng.randint(1, depth)}"  # the same mistake again
        rows.append(
            {
                "id": f"{name}_{depth}_{turn}",
                "parent_id": name,
                "trajectory": list(said),
                "chosen": chosen,
                "rejected": rejected,
            }
        )
        said += [{"from": "assistant", "value": rejected}, {"from": "user", "value": f"no {turn}"}]
    return rows


def read(folder, rows, *, pairs=True, seed=0, **options):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(
        path=str(path),
        format="ultrainteract_pair",
        single_turn_pairs=pairs,
        single_turn_seed=seed,
        **options,
    )
    return list(reading.groups(source, kind="comparison", on_bad_row="refuse", report=Report()))


def conversation_pairs(group):
    return [(group.conversations[one.chosen], group.conversations[one.rejected]) for one in group.comparisons]


def added(folder, rows, **options):
    """(chosen, rejected) actions of the pairs that `single_turn_pairs` adds to the first tree."""
    plain = conversation_pairs(read(folder, rows, pairs=False, **options)[0])
    whole = conversation_pairs(read(folder, rows, **options)[0])
    assert whole[: len(plain)] == plain
    for pair in whole[len(plain) :]:
        assert [[message.role for message in one] for one in pair] == [["user", "assistant"]] * 2
        assert pair[0][0] == pair[1][0] == plain[0][0][0]
    return [(chosen[1].content, rejected[1].content) for chosen, rejected in whole[len(plain) :]]


@pytest.mark.parametrize(("depth", "count"), [(1, 0), (2, 2), (3, 6), (4, 0), (5, 0)])
def test_a_trajectory_of_depth_n_gives_n_times_n_minus_one_while_n_times_n_is_at_most_10(
    tmp_path, depth, count
):
    pairs = added(tmp_path, tree_rows("a", depth))
    assert len(pairs) == len(set(pairs)) == count
    assert (
        set(pairs)
        == {
            (f"right {one}", f"wrong {other}")
            for one, other in itertools.permutations(range(1, depth + 1), 2)
        }
        or not count
    )


def wide_rows(width):
    """Two turns, with `width` correct actions at the second."""
    first, second = tree_rows("a", 2)
    return [first, *(second | {"chosen": f"right {number}"} for number in range(2, width + 2))]


def several_trajectories(seed):
    """Rows of one instruction whose numbers of correct and incorrect actions differ."""
    rng = random.Random(seed)
    if rng.random() < 0.2:
        return wide_rows(rng.randint(1, 6))
    rows = [
        row
        for number in range(rng.randint(1, 4))
        for row in tree_rows("a", rng.choice([1, 2, 2, 3, 3, 3, 4]), rng, rng.choice(["", f"{number} "]))
    ]
    for row in rows:
        if rng.random() < 0.4:
            row["chosen"] = "right 1"
    return rows


def beyond_the_limit(rows, limit):
    """Whether the paper's N x N is above 10."""
    if limit == "depth":
        return max(len(row["trajectory"]) // 2 + 1 for row in rows) ** 2 > 10
    return len({row["chosen"] for row in rows}) * len({row["rejected"] for row in rows}) > 10


@pytest.mark.parametrize("limit", ["depth", "actions"])
@pytest.mark.parametrize("seed", range(200))
def test_the_papers_rules(tmp_path, seed, limit):
    rows = several_trajectories(seed)
    correct, incorrect = {row["chosen"] for row in rows}, {row["rejected"] for row in rows}

    def turns(side, action):
        return {len(row["trajectory"]) for row in rows if row[side] == action}

    allowed = {
        (good, bad)
        for good, bad in itertools.product(correct, incorrect)
        if not turns("chosen", good) & turns("rejected", bad)
    }
    pairs = added(tmp_path, rows, single_turn_limit=limit)
    assert len(pairs) == len(set(pairs)) <= 9
    assert set(pairs) <= allowed
    uses = Counter(("+", good) for good, _ in pairs) + Counter(("-", bad) for _, bad in pairs)
    assert all(count <= 3 for count in uses.values())
    if beyond_the_limit(rows, limit):
        assert not pairs
    elif len(pairs) < 9:  # nothing that was allowed could still be added
        assert all(uses["+", good] == 3 or uses["-", bad] == 3 for good, bad in allowed - set(pairs))


def test_the_random_trees_reach_the_limits(tmp_path):
    reached = Counter()
    for seed in range(200):
        rows = several_trajectories(seed)
        pairs = added(tmp_path, rows)
        reached["too deep"] += beyond_the_limit(rows, "depth")
        reached["too many combinations, not too deep"] += beyond_the_limit(
            rows, "actions"
        ) and not beyond_the_limit(rows, "depth")
        reached["an action three times"] += max(Counter(bad for _, bad in pairs).values(), default=0) == 3
        reached["some"] += bool(pairs)
    assert min(reached.values()) > 5


def test_the_draw_depends_on_seed_and_texts_alone(tmp_path):
    rows = wide_rows(4)  # 5 x 2 actions; "wrong 1" may stand against three of four
    first = added(tmp_path, rows)
    assert len(first) == 4
    assert added(tmp_path, rows) == first
    for seed in range(5):
        assert set(added(tmp_path, random.Random(seed).sample(rows, len(rows)))) == set(first)
    (_, group) = read(tmp_path, [*tree_rows("b", 3), *rows])
    assert [
        (chosen[-1].content, rejected[-1].content) for chosen, rejected in conversation_pairs(group)[5:]
    ] == first
    assert len({frozenset(added(tmp_path, rows, seed=seed)) for seed in range(40)}) == 4


def test_one_more_correct_action_does_not_exclude_a_tree_of_depth_3(tmp_path):
    rows = tree_rows("a", 3)
    rows.append(rows[-1] | {"chosen": "right again"})
    assert len(added(tmp_path, rows)) == 8
    assert added(tmp_path, rows, single_turn_limit="actions") == []


def test_the_count_by_the_papers_table():
    """Trees of 2 and 3 turns with a pair at every turn, as many as Table 1 names."""
    turns = [line.turns for line in ultrainteract.table()]
    count = [sum(line[depth] for line in turns if len(line) > depth) for depth in range(5)]
    assert count[1:3] == [12_199, 4_756]
    drawn = {
        len(tree.pairs): len(single_turn_pairs(tree.pairs, 0))
        for tree in ultrainteract.trees(300, only="interactive")
        if len(tree.pairs) == tree.depth
    }
    assert drawn == {1: 0, 2: 2, 3: 6, 4: 0, 5: 0}
    assert sum(count[depth - 1] * drawn[depth] for depth in (2, 3)) == 52_934
    assert "52,934" in (single_turn_pairs.__doc__ or "")


def test_single_turn_pairs_share_the_trees_sequences_and_its_absolute(tmp_path):
    for absolute in (False, True):
        (group,) = read(tmp_path, tree_rows("a", 2), absolute=absolute)
        # the two actions of turn 1 are sequences of the tree already
        assert len(group.conversations) == 6
        assert [one.absolute for one in group.comparisons] == [absolute] * 4


def test_other_formats_have_no_turns(tmp_path):
    source = Source(path="x.jsonl", format="preference", single_turn_pairs=True)
    with pytest.raises(UserError, match=r"x\.jsonl: single_turn_pairs is made from .*use ultrainteract_pair"):
        reading.groups(source, kind="comparison", on_bad_row="refuse", report=Report())
