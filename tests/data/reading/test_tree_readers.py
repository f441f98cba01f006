"""Readers of whole trees against brute force over paths, published counts of real trees, and hostile rows."""

import contextlib
import gzip
import itertools
import json
import random
from collections import Counter

import own_inputs
import pytest
import reading

from silva.engine.data.reading.tree_readers import mint, nodes, oasst
from silva.engine.data.report import Report
from silva.engine.errors import UserError
from silva.engine.recipe.schema import Source


def write(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path, form, kind="comparison", on_bad_row="refuse", report=None, **options):
    source = Source(path=str(path), format=form, **options)
    return list(reading.groups(source, kind=kind, on_bad_row=on_bad_row, report=report or Report()))


def texts(conversation):
    return [message.content for message in conversation]


def said_pairs(parsed):
    """What each comparison's two conversations say, as text."""
    return [
        tuple("|".join(texts(parsed.conversations[side])) for side in pair) for pair in parsed.comparisons
    ]


# ---------------------------------------------------------------- MINT


def trajectory(success, *turns):
    roles = itertools.cycle(["assistant", "user"])
    return {
        "success": success,
        "turns": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)],
    }


def test_mint_compares_every_success_with_every_failure():
    row = {
        "prompt": "p",
        "trajectories": [
            trajectory(True, "a"),
            trajectory(False, "b", "no", "c"),
            trajectory(True, "b", "no", "d"),
            trajectory(False, "e"),
        ],
    }
    assert set(said_pairs(mint(row, "comparison"))) == {
        (good, bad) for good in ("p|a", "p|b|no|d") for bad in ("p|b|no|c", "p|e")
    }
    assert [texts(one) for one in mint(row, "sequence").conversations] == [["p", "a"], ["p", "b", "no", "d"]]


@pytest.mark.parametrize(
    ("turns", "kept"),
    [
        (["b", "no"], ["b"]),
        (["b", "no", " \n"], ["b"]),
        (["b", "no", "", "no again"], ["b"]),
        (["b", "no", "c", "", "d"], ["b", "no", "c"]),
    ],
)
def test_mint_cuts_a_failure_before_an_empty_turn(turns, kept):
    row = {"prompt": "p", "trajectories": [trajectory(True, "a"), trajectory(False, *turns)]}
    parsed = mint(row, "comparison")
    assert said_pairs(parsed) == [("p|a", "|".join(["p", *kept]))]
    assert sum(parsed.left_out.values()) == 1
    assert next(iter(parsed.left_out)).startswith("truncated: ")


def test_mint_two_observations_in_a_row_are_an_empty_action_between_them():
    turns = [
        {"role": role, "content": text} for role, text in [("assistant", "b"), ("user", "x"), ("user", "y")]
    ]
    row = {"prompt": "p", "trajectories": [trajectory(True, "a"), {"success": False, "turns": turns}]}
    assert said_pairs(mint(row, "comparison")) == [("p|a", "p|b")]


@pytest.mark.parametrize(
    "lost", [trajectory(True, "a", "", "b"), trajectory(True, " "), trajectory(False, "")]
)
def test_mint_leaves_out_what_has_lost_its_last_action(lost):
    row = {"prompt": "p", "trajectories": [lost, trajectory(True, "c", "right!"), trajectory(False, "d")]}
    parsed = mint(row, "comparison")
    assert said_pairs(parsed) == [("p|c", "p|d")]
    assert parsed.left_out["skipped: trajectory with an empty turn"] == 1


@pytest.mark.parametrize(
    ("name", "tasks", "pairs", "successes"),
    [("gsm8k", 45, 2130, 272), ("math", 64, 1876, 173), ("mbpp", 54, 1652, 188)],
)
def test_whole_mint_files(inputs, name, tasks, pairs, successes):
    if not inputs.real:
        tasks, pairs, successes = own_inputs.MINT.values()
    path = inputs / "mint_trees" / f"mint_{name}_open15.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    wins = [sum(one["success"] for one in row["trajectories"]) for row in rows]
    assert sum(won * (len(row["trajectories"]) - won) for won, row in zip(wins, rows, strict=True)) == pairs
    report = Report()
    groups = read(path, "mint", report=report)
    assert len(groups) == tasks
    assert sum(len(group.comparisons) for group in groups) == pairs
    shortened = sum(count for entry, count in report.counts.items() if entry.startswith("truncated"))
    ends_with_user = sum(
        one["turns"][-1]["role"] == "user"
        for won, row in zip(wins, rows, strict=True)
        if 0 < won < len(row["trajectories"])
        for one in row["trajectories"]
    )
    assert shortened == ends_with_user
    assert sum(len(group.conversations) for group in read(path, "mint", "sequence")) == successes


# ---------------------------------------------------------------- nodes: brute force


def random_tree(seed, size):
    """(row, path of texts to each id) of a tree with roles that alternate by depth."""
    rng = random.Random(seed)
    listed, paths = [{"id": 0, "text": "root"}], {0: ("root",)}
    for number in range(1, size):
        parent = rng.randrange(number)
        node = {"id": number, "parent": parent, "text": f"t{number}"}
        node["role"] = ("user", "assistant")[len(paths[parent]) % 2]
        if rng.random() < 0.6:
            node["correct"] = rng.random() < 0.5
        listed.append(node)
        paths[number] = (*paths[parent], f"t{number}")
    rng.shuffle(listed)
    return {"nodes": listed}, paths


@pytest.mark.parametrize("seed", range(30))
def test_correct_answers_against_incorrect_ones_on_other_paths(seed):
    row, paths = random_tree(seed, random.Random(seed).choice([1, 2, 5, 40]))
    judged = {
        paths[node["id"]]: node["correct"]
        for node in row["nodes"]
        if node.get("role") == "assistant" and "correct" in node
    }
    expected = Counter(
        ("|".join(good), "|".join(bad))
        for good, bad in itertools.product(judged, repeat=2)
        if judged[good] and not judged[bad] and good[: len(bad)] != bad and bad[: len(good)] != good
    )
    assert Counter(said_pairs(nodes(row, "comparison"))) == expected
    if judged:
        found = nodes(row, "sequence").conversations
        assert sorted(map(tuple, map(texts, found))) == sorted(path for path, good in judged.items() if good)


@pytest.mark.parametrize("name", ["rank", "score"])
@pytest.mark.parametrize("seed", range(10))
def test_siblings_are_compared_by_rank_or_score(seed, name):
    row, paths = random_tree(seed, 40)
    rng = random.Random(seed)
    scores = {}
    for node in row["nodes"]:
        node.pop("correct", None)
        if rng.random() < 0.8:
            node[name] = rng.choice([0, 1, 2.5])
            if node.get("role") == "assistant":
                scores[paths[node["id"]]] = node[name] if name == "score" else -node[name]
    expected = Counter(
        ("|".join(one), "|".join(other))
        for one, other in itertools.product(scores, repeat=2)
        if one[:-1] == other[:-1] and scores[one] > scores[other]
    )
    assert Counter(said_pairs(nodes(row, "comparison"))) == expected

    def outranked(path):
        return any(
            other[:-1] == path[:-1] and scores[other] > scores[path] for other in scores if path in scores
        )

    roles = {paths[node["id"]]: node.get("role", "user") for node in row["nodes"]}
    good = [
        path
        for path in roles
        if roles[path] == "assistant" and not any(outranked(path[:n]) for n in range(1, len(path) + 1))
    ]
    ends = [path for path in good if not any(other[: len(path)] == path and other != path for other in good)]
    assert sorted(map(tuple, map(texts, nodes(row, "sequence").conversations))) == sorted(ends)


def test_nodes_without_roles_are_one_answer_in_steps(tmp_path):
    steps = [
        {"number": "r", "above": None, "thought": ""},
        {"number": "a", "above": "r", "thought": "1\n"},
        {"number": "b", "above": "a", "thought": "2\n", "right": True},
        {"number": "c", "above": "a", "thought": "3\n", "right": False},
        {"number": "d", "above": "r", "thought": "\n", "right": False},
    ]
    columns = {
        "nodes": "tree",
        "prompt": "question",
        "nodes.id": "number",
        "nodes.parent": "above",
        "nodes.text": "thought",
        "nodes.correct": "right",
    }
    report = Report()
    path = write(tmp_path, [{"question": "q", "tree": steps}])
    (group,) = read(path, "nodes", columns=columns, report=report)
    pairs = [
        (group.conversations[one.chosen], group.conversations[one.rejected]) for one in group.comparisons
    ]
    assert [(texts(chosen), texts(rejected)) for chosen, rejected in pairs] == [
        (["q", "1\n2\n"], ["q", "1\n3\n"])
    ]
    assert report.lines() == ["skipped: judged node without a text: 1 (first: rows.jsonl:1)"]


def test_named_comparisons_come_before_judgements():
    listed = [
        {"id": "r", "text": "q"},
        {"id": 1, "parent": "r", "text": "a", "correct": True},
        {"id": 2, "parent": "r", "text": "b", "correct": False},
        {"id": 3, "parent": "r", "text": "c", "correct": True},
    ]
    row = {"nodes": listed, "comparisons": [["1", 3], [3, 1]]}
    assert said_pairs(nodes(row, "comparison")) == [("q|a", "q|c"), ("q|c", "q|a")]


def test_equal_texts_with_two_verdicts_are_not_compared():
    listed = [
        {"id": 0, "text": "q"},
        {"id": 1, "parent": 0, "text": "a", "correct": True},
        {"id": 2, "parent": 0, "text": "a", "correct": False},
        {"id": 3, "parent": 0, "text": "b", "correct": False},
    ]
    parsed = nodes({"nodes": listed}, "comparison")
    assert said_pairs(parsed) == [("q|a", "q|b")]
    assert parsed.left_out == {"skipped: comparison whose chosen equals rejected": 1}


def test_whole_game_of_24_trees(inputs):
    """The counts of the manifest, and the pairs counted from leaves' own paths."""
    both, pairs, right = (67, 1591, 121) if inputs.real else own_inputs.GAME24.values()
    path = inputs / "tot_game24" / "trees.jsonl.gz"
    groups = read(path, "nodes", columns={"prompt": "input"})
    assert len(groups) == both
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    leaves = [[node["correct"] for node in row["nodes"] if node.get("correct") is not None] for row in rows]
    blank = {
        row["idx"]
        for row in rows
        if any("correct" in node and not node["text"].strip() for node in row["nodes"])
    }
    assert not any(sum(one) for one, row in zip(leaves, rows, strict=True) if row["idx"] in blank)
    expected = sum(sum(one) * (len(one) - sum(one)) for one in leaves)
    assert sum(len(group.comparisons) for group in groups) == expected == pairs
    sequences = read(path, "nodes", "sequence", columns={"prompt": "input"})
    assert sum(len(group.conversations) for group in sequences) == right
    assert all(len(one) == 2 for group in sequences for one in group.conversations)


# ---------------------------------------------------------------- nodes: bad trees

ROOT = {"id": 0, "text": "q"}
GOOD = [
    ROOT,
    {"id": 1, "parent": 0, "text": "a", "score": 1},
    {"id": 2, "parent": 0, "text": "b", "score": 0},
]

BAD_TREES = {
    "a circle": (
        [*GOOD, {"id": 3, "parent": 4, "text": "x"}, {"id": 4, "parent": 3, "text": "y"}],
        "nodes are their own ancestors: '3'",
    ),
    "its own parent": ([*GOOD, {"id": 3, "parent": 3, "text": "x"}], "nodes are their own ancestors: '3'"),
    "circles only": ([{"id": 1, "parent": 2, "text": "x"}, {"id": 2, "parent": 1, "text": "y"}], "ancestors"),
    "no such parent": (
        [*GOOD, {"id": 3, "parent": 9, "text": "x"}],
        "parent is not in the tree: '9', the parent of '3'",
    ),
    "two roots": ([*GOOD, {"id": 3, "text": "x"}], "more than one root: '0' and '3'"),
    "one id twice": ([*GOOD, {"id": "2", "parent": 0, "text": "x"}], "same id: '2'"),
    "no id": ([*GOOD, {"parent": 0, "text": "x"}], "id is neither text nor a whole number: found None"),
    "a list for an id": ([*GOOD, {"id": [], "parent": 0, "text": "x"}], "id is neither text nor"),
    "a flag for an id": ([*GOOD, {"id": True, "parent": 0, "text": "x"}], "id is neither text nor"),
    "an object for a parent": ([*GOOD, {"id": 3, "parent": {}, "text": "x"}], "parent is neither text nor"),
    "no text": ([*GOOD, {"id": 3, "parent": 0}], "a node has no text: it has id, parent"),
    "a null text": ([*GOOD, {"id": 3, "parent": 0, "text": None}], "text is null"),
    "half a character": ([*GOOD, {"id": 3, "parent": 0, "text": "\ud800"}], "not valid Unicode"),
    "no object": ([*GOOD, 3], "a node is not an object: number 4"),
    "an unknown role": (
        [*GOOD, {"id": 3, "parent": 0, "text": "x", "role": "alien"}],
        "unknown role: 'alien'",
    ),
    "a word for correct": (
        [*GOOD, {"id": 3, "parent": 0, "text": "x", "correct": "yes"}],
        "neither true nor",
    ),
    "a word for a score": (
        [*GOOD, {"id": 3, "parent": 0, "text": "x", "score": "9"}],
        "score is not a number",
    ),
    "no number for a rank": (
        [*GOOD, {"id": 3, "parent": 0, "text": "x", "rank": float("nan")}],
        "rank is not",
    ),
    "a root without text": ([{"id": 0, "text": " "}, *GOOD[1:]], "the tree has no instruction"),
    "no nodes": ([], "nodes is not a list with entries"),
    "nodes as text": ("x", "nodes is not a list with entries: found str"),
    "the assistant first": ([ROOT | {"role": "assistant"}, *GOOD[1:]], "do not alternate"),
}


@pytest.mark.parametrize(("listed", "words"), BAD_TREES.values(), ids=BAD_TREES)
def test_a_bad_tree_is_refused_or_counted(tmp_path, listed, words):
    path = write(tmp_path, [{"nodes": GOOD}, {"nodes": listed}, {"nodes": listed}])
    with pytest.raises(UserError) as caught:
        read(path, "nodes")
    line = str(caught.value)
    assert line.startswith("rows.jsonl:2: ")
    assert words in line
    assert "\n" not in line
    report = Report()
    (group,) = read(path, "nodes", on_bad_row="skip", report=report)
    assert len(group.comparisons) == 1
    assert list(report.counts.values()) == [2]
    assert list(report.examples.values()) == ["rows.jsonl:2"]


@pytest.mark.parametrize(
    ("comparisons", "words"),
    [
        ([[1, 2], [1, 9]], "names a node that is not in the tree: '9'"),
        ([[1]], "not [chosen id, rejected id]"),
        (["12"], "not [chosen id, rejected id]"),
        ([[1, None]], "id is neither text nor"),
        ([[1, 0]], "does not end with an assistant"),
        ({}, "comparisons is not a list"),
    ],
)
def test_a_comparison_that_names_no_sequence(tmp_path, comparisons, words):
    path = write(tmp_path, [{"nodes": GOOD}, {"nodes": GOOD, "comparisons": comparisons}])
    with pytest.raises(UserError) as caught:
        read(path, "nodes")
    assert words in str(caught.value)
    report = Report()
    assert len(read(path, "nodes", on_bad_row="skip", report=report)) == 1
    assert list(report.examples.values()) == ["rows.jsonl:2"]


def test_trees_thousands_of_nodes_deep(tmp_path):
    depth = 20_000
    chain = [{"id": n, "parent": n - 1 if n else None, "text": f"{n};"} for n in range(depth)]
    fork = {"id": "other", "parent": depth - 2, "text": "x", "correct": False}
    chain[-1]["correct"] = True
    (group,) = read(write(tmp_path, [{"nodes": [*chain, fork]}]), "nodes")
    chosen, rejected = (group.conversations[side][1].content for side in (0, 1))
    assert chosen == "".join(f"{n};" for n in range(1, depth))
    assert rejected == chosen.removesuffix(f"{depth - 1};") + "x"
    circle = [node | {"parent": (node["id"] + 1) % depth} for node in chain]
    with pytest.raises(UserError, match="their own ancestors"):
        read(write(tmp_path, [{"nodes": circle}]), "nodes")


def test_anything_for_a_node_is_read_or_refused(tmp_path):
    """Random damage to a good tree: one of the values replaced by one of another type."""
    rng = random.Random(0)
    strange = [None, True, 0, -1, 1.5, 1e400, "", "x", [], {}, [[]], {"id": 0}, "\udfff", 10**400]
    for _ in range(400):
        row = json.loads(json.dumps({"nodes": GOOD, "prompt": "p", "comparisons": [[1, 2]]}))
        places = [(row, key) for key in row] + [(node, key) for node in row["nodes"] for key in node]
        for holder, key in rng.sample(places, 2):
            holder[key] = rng.choice(strange)
        path = write(tmp_path, [row])
        for kind in ("comparison", "sequence"):
            with contextlib.suppress(UserError):
                assert read(path, "nodes", kind)


# ---------------------------------------------------------------- OASST


def reply(text, role="assistant", *replies, **more):
    return {"text": text, "role": role, "replies": list(replies), **more}


def test_oasst_ranked_replies():
    follow_up = reply(
        "more?", "prompter", reply("yes", rank=1), reply("no", rank=0), reply("later", rank=2), rank=0
    )
    tree = reply("q", "prompter", reply("a", "assistant", follow_up, rank=0), reply("b", rank=1), reply("c"))
    row = {"message_tree_id": "t", "prompt": tree}
    assert sorted(said_pairs(oasst(row, "comparison"))) == [
        ("q|a", "q|b"),
        ("q|a|more?|no", "q|a|more?|later"),
        ("q|a|more?|no", "q|a|more?|yes"),
        ("q|a|more?|yes", "q|a|more?|later"),
    ]
    assert [texts(one) for one in oasst(row, "sequence").conversations] == [
        ["q", "a", "more?", "no"],
        ["q", "c"],
    ]


def test_oasst_deleted_messages_take_their_replies_along(tmp_path):
    gone = reply("a", "assistant", reply("m", "prompter", reply("x", rank=0), reply("y", rank=1)))
    gone |= {"deleted": True, "rank": 0}
    kept = reply("q", "prompter", gone, reply("b", rank=1), reply("c", rank=2), deleted=False)
    report = Report()
    path = write(tmp_path, [{"prompt": kept}, {"prompt": kept | {"deleted": True}}])
    (group,) = read(path, "oasst", report=report)
    assert [texts(one) for one in group.conversations] == [["q", "b"], ["q", "c"]]
    assert report.counts == {
        "skipped: deleted message with its replies": 1,
        "skipped: no pair: no two answers are judged differently": 1,
    }


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ("q", "a message is not an object: found str"),
        (reply("q", "prompter") | {"replies": "x"}, "replies is not a list"),
        (reply("q", "prompter") | {"replies": [3]}, "a message is not an object: found int"),
        (reply("q", None, reply("a")), "unknown role: None"),
        (reply("q", "prompter", reply("a", rank="0")), "rank is not a number"),
        (reply(3, "prompter"), "text is not text"),
        (reply("q", "prompter", reply("a", "prompter", reply("b", rank=0), reply("c", rank=1))), None),
        (reply("q", "assistant", reply("a", rank=0), reply("b", rank=1)), "do not alternate"),
    ],
)
def test_malformed_oasst(tmp_path, tree, words):
    path = write(tmp_path, [{"prompt": tree}])
    if words is None:
        assert len(read(path, "oasst")) == 1  # two messages of one side in a row are one
        return
    with pytest.raises(UserError) as caught:
        read(path, "oasst")
    assert words in str(caught.value)


def test_oasst_nested_deeper_than_recursion_goes():
    tree = reply("end", "assistant")
    for level in range(5000):
        tree = reply(str(level), "assistant" if level % 2 else "prompter", tree)
    tree["role"] = "prompter"
    assert len(oasst({"prompt": tree}, "sequence").conversations) == 1
