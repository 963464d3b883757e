"""Sites that die or come late, too few sites, coordinators that begin again: what is waited for, counted and said."""

import pytest

pytest.importorskip("flwr")

from flower_net import after_which, breaks, dies, ends, late
from flower_worlds import World, absent, dropped, same, tiny

import idiolect
from idiolect import methods, parts
from idiolect.core.errors import UsageError
from idiolect.flower.coordinator.requests import TooFewSitesError

METHOD = methods.fedbn() + parts.control_variates()


# sites that die


def test_a_site_lost_in_a_round_comes_back_with_its_state(tmp_path):
    """The round is complete without it, since enough results are there; its next one starts from what counted last."""
    world = World(tmp_path, METHOD, quorum=3)
    world.net.plan["ben", "train", 2] = [dies(back=30, trained=True)]
    seen = []
    world.net.plan["ada", "train", 3] = [after_which(lambda: seen.append(world.status()), late(60))]
    made = world.play()
    assert dropped(made) == [[], [], ["ben"], []]
    assert world.trained()[-2:] == [("dan", 3, 3), ("ben", 3, 2)]
    assert world.said("ben")[:3] == ["no reply: Node Unavailable", "offline", "no result: offline"]
    assert seen[0]["sites"]["ben"]["state"] == "offline"
    same(world, made, world.rehearsed(absent(made)))


@pytest.mark.parametrize("anew", [False, True], ids=["same node", "new node"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("back", [0.1, 35.0])
def test_a_message_that_was_lost_with_its_site_is_sent_again(tmp_path, anew, trained, back):
    world = World(tmp_path, METHOD, quorum=4)
    world.net.plan["ben", "train", 2] = [dies(back, trained=trained, anew=anew)]
    made = world.play()
    same(world, made, world.rehearsed())
    assert dropped(made) == [[]] * 4
    assert world.trained().count(("ben", 2, 2)) == 2
    assert world.trained().count(("ada", 2, 2)) == 1
    assert [what for client, what in world.events() if client == "ben" and what.startswith("here, with 3")]
    if back == 35.0:
        assert "waiting: 3 of 4 results that a round needs; ends in 1200 s" in [what for _, what in world.events()]


def test_a_site_that_comes_back_before_the_network_has_noticed_gets_its_message_again(tmp_path):
    """Its node was never seen to be offline; the activation stamp alone tells that the process is another."""
    world = World(tmp_path, METHOD, quorum=4)

    def restart(visit):
        visit.answer()
        [node] = world.net.stop("ben")
        world.net.start("ben", node)

    world.net.plan["ben", "train", 2] = [restart]
    made = world.play()
    same(world, made, world.rehearsed())
    assert world.trained().count(("ben", 2, 2)) == 2
    assert world.said("ben") == []


def test_a_site_that_dies_of_every_message_is_given_up_for_the_round(tmp_path):
    world = World(tmp_path, METHOD, quorum=2)
    world.net.plan["ben", "train", 1] = [dies(back=0.1)] * 9
    made = world.play()
    assert dropped(made) == [[], ["ben"], [], []]
    assert made.records[1]["dropped"] == {"ben": "no result after 3 messages"}
    assert "no result: no result after 3 messages" in world.said("ben")
    assert world.trained().count(("ben", 1, 1)) == 3
    same(world, made, world.rehearsed(absent(made)))


def test_an_app_that_fails_is_asked_again_and_then_given_up_for_the_round(tmp_path):
    world = World(tmp_path, METHOD)
    world.net.plan["ben", "train", 1] = [breaks]
    world.net.plan["ben", "train", 2] = [breaks] * 9
    world.net.plan["cleo", "query", 0] = [breaks] * 2
    made = world.play()
    assert dropped(made) == [[], [], ["ben"], []]
    assert world.said("ben").count("no reply: ZeroDivisionError: somewhere") == 2
    assert world.clock.now - 1e6 > 60, "a site that fails to say who it is was asked again at once"
    same(world, made, world.rehearsed(absent(made)))


# sites that are late


def test_a_late_result_does_not_count_and_its_site_goes_back_to_its_state_before(tmp_path):
    """As in a simulation in which that client did not take part, whenever its reply comes."""
    world = World(tmp_path, METHOD, rounds=5, deadline=100)
    world.net.plan["ben", "train", 1] = [late(150)]
    world.net.plan["ben", "train", 3] = [late(99)]
    made = world.play()
    assert dropped(made) == [[], ["ben"], [], [], []]
    assert made.records[1]["dropped"] == {"ben": "past the deadline"}
    assert world.said("ben") == ["no result: past the deadline"]
    assert [(played, base) for client, played, base in world.trained() if client == "ben"] == [
        (0, 0),
        (1, 1),
        (2, 1),  # not from what the late result has left
        (3, 3),
        (4, 4),
    ]
    same(world, made, world.rehearsed({(1, "ben")}))


def test_a_round_that_has_too_few_at_its_deadline_is_played_again_and_nobody_trains_twice(tmp_path):
    world = World(tmp_path, METHOD, quorum=4, deadline=100)
    world.net.plan["ben", "train", 2] = [late(150), late(120)]
    made = world.play()
    assert dropped(made) == [[]] * 4
    assert [t for t in world.trained() if t[1] == 2] == [(client, 2, 2) for client in world.clients] * 3
    said = [what for client, what in world.events() if not client]
    assert any(what.startswith("waiting: round 3 had 3 of 4 results it needs; ends in") for what in said)
    same(world, made, world.rehearsed())


def test_who_is_slow_is_waited_for_until_the_deadline_even_if_enough_are_there(tmp_path):
    world = World(tmp_path, METHOD, quorum=1, deadline=100)
    world.net.plan["ben", "train", 1] = [late(90)]
    made = world.play()
    assert dropped(made) == [[]] * 4
    assert made.records[1]["seconds"] >= 90
    same(world, made, world.rehearsed())


# too few sites


def test_the_first_round_waits_for_enough_sites_and_says_how_long(tmp_path):
    world = World(tmp_path, METHOD, give_up=60)
    world.net.stop("dan")
    with pytest.raises(TooFewSitesError, match=r"3 of 4 sites joined; nothing has moved for 60 s"):
        world.play()
    said = [what for client, what in world.events() if what.startswith("waiting")]
    assert said == ["waiting: 0 of 4 sites joined; ends in 60 s"] + [
        f"waiting: 3 of 4 sites joined; ends in {left} s" for left in (60, 50, 40, 30, 20, 10)
    ]
    assert world.status()["phase"] == "gave up: 3 of 4 sites joined"
    assert world.trained() == []


def test_a_site_may_come_in_the_last_minute_and_later_ones_join(tmp_path):
    world = World(tmp_path, METHOD, give_up=60)
    world.net.stop("dan")
    world.clock.after(55, lambda: world.net.start("dan"))
    same(world, world.play(), world.rehearsed())


def test_a_round_that_never_has_enough_ends_the_run_though_one_site_answers_every_time(tmp_path):
    world = World(tmp_path, METHOD, quorum=4, deadline=50, give_up=400)
    world.net.plan["ben", "train", 1] = [late(90)] * 99
    with pytest.raises(TooFewSitesError, match=r"round 2 had 3 of 4 results it needs; nothing has moved for 400 s"):
        world.play()
    assert 3 < world.trained().count(("ada", 1, 1)) < 10
    assert world.status()["phase"] == "gave up: round 2 had 3 of 4 results it needs"


def test_sites_that_stay_away_end_the_run_and_another_coordinator_goes_on(tmp_path):
    world = World(tmp_path, METHOD, give_up=100)
    for client in ("ada", "ben", "cleo"):
        world.net.plan[client, "train", 2] = [dies(back=None)]
    with pytest.raises(TooFewSitesError, match="1 of 3 results that a round needs; nothing has moved for 100 s"):
        world.play()
    for client in ("ada", "ben", "cleo"):
        world.net.start(client)
    made = world.play()
    assert (None, "going on with what") in [(c or None, what[:18]) for c, what in world.events()]
    same(world, made, world.rehearsed())


def test_a_quorum_that_is_not_named_is_more_than_half(tmp_path):
    world = World(tmp_path, METHOD, rounds=2)
    for client in ("ada", "ben"):
        world.net.plan[client, "train", 1] = [dies(back=5)]
    made = world.play()
    assert dropped(made) == [[], []]
    other = World(tmp_path / "other", METHOD, rounds=2)
    other.net.plan["ada", "train", 1] = [dies(back=5)]
    assert dropped(other.play()) == [[], ["ada"]]


# a coordinator that begins again


def test_a_coordinator_that_begins_again_gives_its_sites_time_to_come_back(tmp_path):
    """One site answers at once and is a quorum; the others have data to load before they can say who they are."""
    world = World(tmp_path, METHOD, quorum=1)
    world.net.plan["ada", "train", 2] = [ends]
    world.play()
    for client in ("ben", "cleo", "dan"):
        world.net.plan[client, "query", 0] = [late(60)]
    made = world.play()
    assert dropped(made) == [[]] * 4
    same(world, made, world.rehearsed())


def test_who_does_not_come_back_after_a_restart_is_waited_for_two_minutes_and_no_longer(tmp_path):
    world = World(tmp_path, METHOD, quorum=2)
    world.net.plan["ada", "train", 2] = [ends]
    world.play()
    world.net.stop("dan")
    made = world.play()
    assert dropped(made) == [[], [], ["dan"], ["dan"]]
    assert 110 < made.records[2]["seconds"] < 130
    assert made.records[3]["seconds"] < 5
    same(world, made, world.rehearsed(absent(made)), ["ada", "ben", "cleo"])


def test_mail_outlives_the_coordinator_and_is_delivered_once_it_counts(tmp_path):
    sizes = {"ada": 9, "Zürich.2": 3, "c-3": 12, "dan": 5}
    world = World(tmp_path, methods.fedpac(strength=0.7), participation=0.5, rounds=6, sizes=sizes)
    for played in range(1, 6):
        for client in world.clients:
            world.net.plan[client, "train", played] = [ends]
    made = [world.play() for _ in range(12)][-1]
    assert made.round == 6
    same(world, made, world.rehearsed())


def test_the_second_coordinator_in_a_directory_is_refused_and_writes_nothing(tmp_path):
    world = World(tmp_path, METHOD, rounds=1)
    world.play()
    with world.timed():
        world.coordinator()
        with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
            file.write('{"round": 2')  # the first one is writing
        before = contents(tmp_path / "run")
        with pytest.raises(UsageError, match=r"run is in use by process \d+: only one at a time may be at work in it"):
            world.coordinator()
        assert contents(tmp_path / "run") == before


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_directory_of_another_run_is_refused_with_what_differs(tmp_path):
    world = World(tmp_path, METHOD, rounds=1)
    world.play()
    before = contents(tmp_path / "run")
    other = World(tmp_path, methods.fedavg(), rounds=2, seed=3)
    with pytest.raises(UsageError, match=r"other settings: method was .*; rounds was 1, is 2; seed was 0, is 3"):
        other.play()
    assert contents(tmp_path / "run") == before
    fit_here = tmp_path / "simulation"
    machine, output = idiolect.Machine(engine="sequential"), idiolect.Output(fit_here / "run", report=False)
    idiolect.fit(tiny(), world.clients, METHOD, rounds=1, machine=machine, output=output)
    with pytest.raises(UsageError, match=r"started with other settings: run was None, is "):
        World(fit_here, METHOD, rounds=1).play()


def test_a_folder_of_other_things_is_left_alone_and_one_that_was_only_locked_is_begun_in(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").touch()
    assert World(tmp_path, METHOD, rounds=1).play().round == 1
    folder = tmp_path / "other" / "run"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").touch()
    with pytest.raises(UsageError, match="is not empty and holds no run of idiolect"):
        World(tmp_path / "other", METHOD, rounds=1).play()
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]
