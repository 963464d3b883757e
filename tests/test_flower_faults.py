"""Sites that die or reply late, too few sites, coordinators that restart: results, waiting and events."""

import pytest

pytest.importorskip("flwr")

from flower_grid import after, app_fails, coordinator_dies, replies_late, site_dies
from flower_worlds import World, absent, assert_same, dropped, tiny

import idiolect
from idiolect import methods, parts
from idiolect.core.errors import UsageError
from idiolect.flower.coordinator.requests import TooFewSitesError

METHOD = methods.fedbn() + parts.control_variates()


# sites that die


def test_a_site_that_dies_in_a_round_comes_back_with_its_state(tmp_path):
    """The round completes without it, with enough results; its next round starts from its last state that counted."""
    world = World(tmp_path, METHOD, quorum=3)
    world.grid.faults["ben", "train", 2] = [site_dies(back=30, trained=True)]
    seen = []
    world.grid.faults["ada", "train", 3] = [after(lambda: seen.append(world.status()), replies_late(60))]
    coordinator = world.play()
    assert dropped(coordinator) == [[], [], ["ben"], []]
    assert world.trained()[-2:] == [("dan", 3, 3), ("ben", 3, 2)]
    assert world.events_of("ben")[:3] == ["no reply: Node Unavailable", "offline", "no result: offline"]
    assert seen[0]["sites"]["ben"]["state"] == "offline"
    assert_same(world, coordinator, world.trained_federation(absent(coordinator)))


@pytest.mark.parametrize("new_node", [False, True], ids=["same node", "new node"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("back", [0.1, 35.0])
def test_a_message_that_was_lost_with_its_site_is_sent_again(tmp_path, new_node, trained, back):
    world = World(tmp_path, METHOD, quorum=4)
    world.grid.faults["ben", "train", 2] = [site_dies(back, trained=trained, new_node=new_node)]
    coordinator = world.play()
    assert_same(world, coordinator, world.trained_federation())
    assert dropped(coordinator) == [[]] * 4
    assert world.trained().count(("ben", 2, 2)) == 2
    assert world.trained().count(("ada", 2, 2)) == 1
    assert [text for client, text in world.events() if client == "ben" and text.startswith("joined with 3")]
    if back == 35.0:
        assert "waiting: 3 of 4 required results; giving up in 1200 s" in [text for _, text in world.events()]


def test_a_site_that_restarts_before_the_network_notices_gets_its_message_again(tmp_path):
    """Its node never appears offline; only the time of activation shows that the process is another."""
    world = World(tmp_path, METHOD, quorum=4)

    def restart(delivery):
        delivery.answer()
        [node] = world.grid.stop("ben")
        world.grid.start("ben", node)

    world.grid.faults["ben", "train", 2] = [restart]
    coordinator = world.play()
    assert_same(world, coordinator, world.trained_federation())
    assert world.trained().count(("ben", 2, 2)) == 2
    assert world.events_of("ben") == []


def test_a_site_that_dies_of_every_message_is_dropped_for_the_round(tmp_path):
    world = World(tmp_path, METHOD, quorum=2)
    world.grid.faults["ben", "train", 1] = [site_dies(back=0.1)] * 9
    coordinator = world.play()
    assert dropped(coordinator) == [[], ["ben"], [], []]
    assert coordinator.records[1]["dropped"] == {"ben": "no reply to 3 requests"}
    assert "no result: no reply to 3 requests" in world.events_of("ben")
    assert world.trained().count(("ben", 1, 1)) == 3
    assert_same(world, coordinator, world.trained_federation(absent(coordinator)))


def test_an_app_that_fails_is_asked_again_and_then_dropped_for_the_round(tmp_path):
    world = World(tmp_path, METHOD)
    world.grid.faults["ben", "train", 1] = [app_fails]
    world.grid.faults["ben", "train", 2] = [app_fails] * 9
    world.grid.faults["cleo", "query", 0] = [app_fails] * 2
    coordinator = world.play()
    assert dropped(coordinator) == [[], [], ["ben"], []]
    assert world.events_of("ben").count("no reply: ZeroDivisionError: somewhere") == 2
    assert world.clock.now - 1e6 > 60, "a site that failed to register was asked again at once"
    assert_same(world, coordinator, world.trained_federation(absent(coordinator)))


# late results


def test_a_late_result_is_ignored_and_its_site_goes_back_to_its_state_before_the_round(tmp_path):
    """The run equals a simulation in which the client did not take part in that round."""
    world = World(tmp_path, METHOD, rounds=5, deadline=100)
    world.grid.faults["ben", "train", 1] = [replies_late(150)]
    world.grid.faults["ben", "train", 3] = [replies_late(99)]
    coordinator = world.play()
    assert dropped(coordinator) == [[], ["ben"], [], [], []]
    assert coordinator.records[1]["dropped"] == {"ben": "deadline passed"}
    assert world.events_of("ben") == ["no result: deadline passed"]
    assert [(played, base) for client, played, base in world.trained() if client == "ben"] == [
        (0, 0),
        (1, 1),
        (2, 1),  # not from the state of the late result
        (3, 3),
        (4, 4),
    ]
    assert_same(world, coordinator, world.trained_federation({(1, "ben")}))


def test_a_round_with_too_few_results_at_its_deadline_is_repeated_from_the_same_states(tmp_path):
    world = World(tmp_path, METHOD, quorum=4, deadline=100)
    world.grid.faults["ben", "train", 2] = [replies_late(150), replies_late(120)]
    coordinator = world.play()
    assert dropped(coordinator) == [[]] * 4
    assert [t for t in world.trained() if t[1] == 2] == [(client, 2, 2) for client in world.clients] * 3
    texts = [text for client, text in world.events() if not client]
    assert any(text.startswith("waiting: round 3 got 3 of 4 required results; giving up in") for text in texts)
    assert_same(world, coordinator, world.trained_federation())


def test_slow_sites_are_waited_for_until_the_deadline_even_with_enough_results(tmp_path):
    world = World(tmp_path, METHOD, quorum=1, deadline=100)
    world.grid.faults["ben", "train", 1] = [replies_late(90)]
    coordinator = world.play()
    assert dropped(coordinator) == [[]] * 4
    assert coordinator.records[1]["seconds"] >= 90
    assert_same(world, coordinator, world.trained_federation())


# too few sites


def test_the_first_round_waits_for_enough_sites(tmp_path):
    world = World(tmp_path, METHOD, give_up=60)
    world.grid.stop("dan")
    with pytest.raises(TooFewSitesError, match=r"3 of 4 sites joined; no progress for 60 s"):
        world.play()
    texts = [text for client, text in world.events() if text.startswith("waiting")]
    assert texts == ["waiting: 0 of 4 sites joined; giving up in 60 s"] + [
        f"waiting: 3 of 4 sites joined; giving up in {left} s" for left in (60, 50, 40, 30, 20, 10)
    ]
    assert world.status()["phase"] == "gave up: 3 of 4 sites joined"
    assert world.trained() == []


def test_a_site_may_join_shortly_before_the_coordinator_gives_up(tmp_path):
    world = World(tmp_path, METHOD, give_up=60)
    world.grid.stop("dan")
    world.clock.after(55, lambda: world.grid.start("dan"))
    assert_same(world, world.play(), world.trained_federation())


def test_a_round_that_never_gets_enough_results_ends_the_run(tmp_path):
    world = World(tmp_path, METHOD, quorum=4, deadline=50, give_up=400)
    world.grid.faults["ben", "train", 1] = [replies_late(90)] * 99
    with pytest.raises(TooFewSitesError, match=r"round 2 got 3 of 4 required results; no progress for 400 s"):
        world.play()
    assert 3 < world.trained().count(("ada", 1, 1)) < 10
    assert world.status()["phase"] == "gave up: round 2 got 3 of 4 required results"


def test_too_few_sites_end_the_run_and_a_new_coordinator_resumes_it(tmp_path):
    world = World(tmp_path, METHOD, give_up=100)
    for client in ("ada", "ben", "cleo"):
        world.grid.faults[client, "train", 2] = [site_dies(back=None)]
    with pytest.raises(TooFewSitesError, match="1 of 3 required results; no progress for 100 s"):
        world.play()
    for client in ("ada", "ben", "cleo"):
        world.grid.start(client)
    coordinator = world.play()
    assert ("", "resuming the run") in [(client, text[:16]) for client, text in world.events()]
    assert_same(world, coordinator, world.trained_federation())


def test_the_default_quorum_is_more_than_half(tmp_path):
    world = World(tmp_path, METHOD, rounds=2)
    for client in ("ada", "ben"):
        world.grid.faults[client, "train", 1] = [site_dies(back=5)]
    coordinator = world.play()
    assert dropped(coordinator) == [[], []]
    other = World(tmp_path / "other", METHOD, rounds=2)
    other.grid.faults["ada", "train", 1] = [site_dies(back=5)]
    assert dropped(other.play()) == [[], ["ada"]]


# a coordinator that restarts


def test_a_restarted_coordinator_gives_its_sites_time_to_reconnect(tmp_path):
    """One site answers at once and is a quorum; the others must load data before they can register."""
    world = World(tmp_path, METHOD, quorum=1)
    world.grid.faults["ada", "train", 2] = [coordinator_dies]
    world.play()
    for client in ("ben", "cleo", "dan"):
        world.grid.faults[client, "query", 0] = [replies_late(60)]
    coordinator = world.play()
    assert dropped(coordinator) == [[]] * 4
    assert_same(world, coordinator, world.trained_federation())


def test_a_restarted_coordinator_waits_two_minutes_for_a_missing_site(tmp_path):
    world = World(tmp_path, METHOD, quorum=2)
    world.grid.faults["ada", "train", 2] = [coordinator_dies]
    world.play()
    world.grid.stop("dan")
    coordinator = world.play()
    assert dropped(coordinator) == [[], [], ["dan"], ["dan"]]
    assert 110 < coordinator.records[2]["seconds"] < 130
    assert coordinator.records[3]["seconds"] < 5
    assert_same(world, coordinator, world.trained_federation(absent(coordinator)), ["ada", "ben", "cleo"])


def test_messages_to_single_clients_survive_a_restart_of_the_coordinator(tmp_path):
    sizes = {"ada": 9, "Zürich.2": 3, "c-3": 12, "dan": 5}
    world = World(tmp_path, methods.fedpac(strength=0.7), participation=0.5, rounds=6, sizes=sizes)
    for played in range(1, 6):
        for client in world.clients:
            world.grid.faults[client, "train", played] = [coordinator_dies]
    coordinator = [world.play() for _ in range(12)][-1]
    assert coordinator.round == 6
    assert_same(world, coordinator, world.trained_federation())


def test_a_second_coordinator_in_a_directory_is_refused_and_writes_nothing(tmp_path):
    world = World(tmp_path, METHOD, rounds=1)
    world.play()
    with world.timed():
        world.coordinator().open()
        with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
            file.write('{"round": 2')  # the first coordinator is writing
        before = contents(tmp_path / "run")
        with pytest.raises(UsageError, match=r"run is in use by process \d+: only one process may use it at a time"):
            world.coordinator().open()
        assert contents(tmp_path / "run") == before


def test_making_a_coordinator_writes_and_locks_nothing(tmp_path):
    world = World(tmp_path, METHOD, rounds=1)
    with world.timed():
        world.coordinator()
        assert not list(tmp_path.iterdir())
        world.coordinator().open()
        world.coordinator()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_directory_of_another_run_is_refused_and_the_differences_are_named(tmp_path):
    world = World(tmp_path, METHOD, rounds=1)
    world.play()
    before = contents(tmp_path / "run")
    other = World(tmp_path, methods.fedavg(), rounds=2, seed=3)
    with pytest.raises(UsageError, match=r"other settings: method was .*; rounds was 1, is 2; seed was 0, is 3"):
        other.play()
    assert contents(tmp_path / "run") == before
    simulation = tmp_path / "simulation"
    machine, output = idiolect.Machine(engine="sequential"), idiolect.Output(simulation / "run", report=False)
    idiolect.fit(tiny(), world.clients, METHOD, rounds=1, machine=machine, output=output)
    with pytest.raises(UsageError, match=r"started with other settings: run was None, is "):
        World(simulation, METHOD, rounds=1).play()


def test_a_folder_with_other_files_is_refused_and_one_with_only_a_lock_file_is_used(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").touch()
    assert World(tmp_path, METHOD, rounds=1).play().round == 1
    folder = tmp_path / "other" / "run"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").touch()
    with pytest.raises(UsageError, match="is not empty and holds no run of idiolect"):
        World(tmp_path / "other", METHOD, rounds=1).play()
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]
