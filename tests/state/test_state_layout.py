"""The seeds' state: a checked table, values that cannot drift, few bytes."""

import copy
import pickle

import pytest
import torch

from esper.contracts.errors import SeedLifecycleError
from esper.contracts.lifecycle import ALLOWED_TRANSITIONS
from esper.state.state_layout import KasminaStateLayout, SeedLifecycleState

S = SeedLifecycleState
PAIRS = [(before, after) for before in S for after in S]


def layout_in(state, num_seeds=2):
    """Return a layout whose seed 0 is in `state`."""
    layout = KasminaStateLayout(num_seeds)
    layout.restore_seed(0, state, alpha=0.0, kernel_id=None)
    return layout


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_only_the_table_is_allowed(before, after):
    """A transition of the table is made; any other raises and changes nothing."""
    layout = layout_in(before)
    if after in ALLOWED_TRANSITIONS[before]:
        layout.transition_seed_state(0, after)
        assert layout.state(0) == after
    else:
        arrays = layout.__getstate__()["arrays"]
        with pytest.raises(SeedLifecycleError, match=before.name):
            layout.transition_seed_state(0, after)
        assert layout.__getstate__()["arrays"] == arrays


@pytest.mark.parametrize("seed_idx", [-1, 2])
def test_an_index_names_a_seed_or_raises(seed_idx):
    """Negative indices do not count from the end."""
    with pytest.raises(ValueError, match="not in"):
        KasminaStateLayout(2).transition_seed_state(seed_idx, S.LOADING)


def test_tensors_share_the_memory_that_transitions_write():
    """A transition is seen through the tensor at once."""
    layout = KasminaStateLayout(3)
    states = layout.lifecycle_states
    layout.transition_seed_state(1, S.LOADING)
    assert states.tolist() == [0, 1, 0]


def test_a_batch_moves_all_or_none():
    """If one seed of a batch may not move, none moves."""
    layout = layout_in(S.FOSSILIZED)
    with pytest.raises(SeedLifecycleError):
        layout.transition_seeds([1, 0], S.LOADING)
    assert layout.state(1) == S.DORMANT


def test_masks_and_counts():
    """Masks are those of the states; a fossil contributes while it holds a kernel."""
    layout = KasminaStateLayout(3)
    layout.restore_seed(0, S.ACTIVE, alpha=0.5, kernel_id="a")
    layout.restore_seed(1, S.FOSSILIZED, alpha=1.0, kernel_id="b")
    assert layout.get_active_seeds().tolist() == [True, False, False]
    assert layout.get_dormant_seeds().tolist() == [False, False, True]
    assert layout.get_contributing_seeds().tolist() == [True, True, False]
    layout.release_kernel(1)
    assert layout.get_contributing_seeds().tolist() == [True, False, False]
    assert layout.has_active_seeds()


def test_artifact_ids_are_kept_as_they_are():
    """The kernel's id is stored whole; equal ints never stand for different kernels."""
    layout = layout_in(S.LOADING)
    layout.transition_seed_state(0, S.ACTIVE, "f" * 64)
    first = int(layout.active_kernel_id[0])
    layout.transition_seed_state(0, S.ACTIVE, "e" * 64)
    assert layout.kernel_id(0) == "e" * 64
    assert int(layout.active_kernel_id[0]) != first


def test_the_third_fault_in_a_row_isolates():
    """Three faults in a row enter ERROR_RECOVERY; a success between them does not count."""
    layout = layout_in(S.ACTIVE)
    assert [layout.increment_error_count(0) for _ in range(2)] == [1, 2]
    layout.record_success(0)
    layout.increment_error_count(0)
    layout.increment_error_count(0)
    assert layout.state(0) == S.ACTIVE
    layout.increment_error_count(0)
    assert layout.state(0) == S.ERROR_RECOVERY
    assert bool(layout.fallback_active[0])


def test_a_new_kernel_does_not_answer_for_the_old_ones_faults():
    """A swap empties the fault window: one fault of the new kernel is one fault."""
    layout = layout_in(S.ACTIVE)
    layout.record_calls(0, [True, False] * 9)
    layout.update_telemetry(0, 10, 0.5)
    layout.transition_seed_state(0, S.ACTIVE, "another")
    assert layout.fault_rate(0) == 0.0
    assert layout.health(0) is None
    layout.increment_error_count(0)
    assert layout.state(0) == S.ACTIVE


def test_health_of_zero_is_a_sample():
    """Health 0 is not taken for "no sample": the next one moves it by a tenth."""
    layout = KasminaStateLayout(1)
    assert layout.health(0) is None
    layout.update_telemetry(0, 10, 0.0)
    layout.update_telemetry(0, 10, 1.0)
    assert layout.health(0) == pytest.approx(0.1)


@pytest.mark.parametrize(("latency_us", "health"), [(-1, 0.5), (1, 1.5), (1, float("nan"))])
def test_telemetry_out_of_range_is_refused(latency_us, health):
    """Negative times and healths outside of [0, 1] raise."""
    with pytest.raises(ValueError, match="telemetry of seed 0"):
        KasminaStateLayout(1).update_telemetry(0, latency_us, health)


def test_long_latencies_are_kept():
    """65 ms and more fit: the clamp is at 2**31 - 1 us."""
    layout = KasminaStateLayout(1)
    layout.update_telemetry(0, 10**7, 1.0)
    assert int(layout.exec_latency_us[0]) == 10**7
    layout.update_telemetry(0, 2**40, 1.0)
    assert int(layout.exec_latency_us[0]) == 2**31 - 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_keep_values_and_share_nothing(duplicate):
    """A copy has the same values in memory of its own."""
    layout = layout_in(S.ACTIVE)
    layout.set_alpha(0, 0.25)
    layout.increment_error_count(0)
    twin = duplicate(layout)
    assert (twin.state(0), twin.alpha(0), int(twin.error_count[0])) == (S.ACTIVE, 0.25, 1)
    twin.set_alpha(0, 0.5)
    assert layout.alpha(0) == 0.25
    assert float(twin.alpha_blend[0]) == 0.5


def test_a_seed_takes_at_most_40_bytes():
    """The arrays take what their tensors say, and no more than 40 bytes a seed."""
    layout = KasminaStateLayout(8)
    tensors = [t for t in vars(layout).values() if isinstance(t, torch.Tensor)]
    assert sum(t.numel() * t.element_size() for t in tensors) == 8 * layout.bytes_per_seed
    assert layout.bytes_per_seed <= 40


def test_transitions_write_the_epoch():
    """last_update_epoch is the owner's epoch at the last transition, -1 before the first."""
    layout = KasminaStateLayout(2)
    layout.epoch = 7
    layout.transition_seed_state(0, S.LOADING)
    assert layout.last_update_epoch.tolist() == [7, -1]


def test_alpha_does_not_stall_near_one():
    """Alpha is float32: a ramp of 100,000 steps moves at every step."""
    layout = KasminaStateLayout(1)
    values = {layout.set_alpha(0, 1.0 - step / 100_000) for step in range(50)}
    assert len(values) == 50


def test_a_layout_is_equal_to_itself_alone():
    """Layouts can be compared and be keys, however many seeds they have."""
    layout, other = KasminaStateLayout(3), KasminaStateLayout(3)
    assert layout == layout
    assert layout != other
    assert {layout: 1}[layout] == 1
