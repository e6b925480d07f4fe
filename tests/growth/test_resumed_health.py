"""What is known of layers and seeds goes on with a resumed run: it decides where may be grown."""

import pytest
import torch
from growing import compute_loss, equal_states, evaluate, growing, host, state_of, train

import esper
from esper.wrapping.wrap import layers

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:nothing can grow")]
KERNEL = "mlp-4x4-w32"


class Kept:
    def __init__(self):
        self.events = []

    def publish(self, event):
        self.events.append(event)

    def of(self, kind):
        return [event for event in self.events if event.kind == kind]


class Told(esper.Policy):
    """Never grows; keeps which layers it was told are not healthy."""

    def __init__(self):
        self.unhealthy = []

    def decide(self, reading):
        self.unhealthy.append(reading.unhealthy)
        return esper.Decision(grow=False, verdict="waiting", reason="never")


class Course:
    """A run whose first layer has a kernel that fails when it is told to."""

    def __init__(self, *, has_kernel=False):
        self.model = esper.wrap(host())
        self.layer = layers(self.model)["0"]
        if has_kernel:
            self.layer.graft(0, KERNEL, alpha=0.5)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.sink, self.policy = Kept(), Told()
        given = {"compute_loss": compute_loss, "evaluate": evaluate}
        self.grower = growing(
            self.model, self.optimizer, policy=self.policy, sink=self.sink, **given
        )

    def train(self, num, *, is_bad=False):
        weights = list(self.layer.seed_kernel(0).parameters())
        kept = [p.detach().clone() for p in weights]
        if is_bad:
            fill(weights, [torch.full_like(p, torch.nan) for p in weights])
        train(self.model, self.optimizer, num, self.grower, random_seed=self.grower.updates)
        if is_bad:
            fill(weights, kept)
        return self

    def resumed(self, *, forgets=False):
        """Return a run in objects built anew that goes on from here."""
        made, state = Course(), self.grower.state_dict()
        made.model.load_state_dict(self.model.state_dict())
        made.optimizer.load_state_dict(self.optimizer.state_dict())
        if forgets:
            del state["health"]
        made.grower.load_state_dict(state)
        return made


def fill(parameters, values):
    with torch.no_grad():
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)


def some_faults():
    """Return a run with ten clean calls, and one that was at fault in each two after them."""
    course = Course(has_kernel=True).train(10)
    for _ in range(4):
        course.train(1, is_bad=True).train(1)
    return course


def measured_at_100(course):
    course.train(100 - course.grower.updates)
    (found,) = course.sink.of("seed_measured")
    return (found.calls, found.faults, found.fault_rate)


def test_counts_of_a_seed_go_on():
    """Those of the resumed run are those of the one that was not stopped; a control forgets."""
    course = some_faults()
    resumed, forgetful = course.resumed(), course.resumed(forgets=True)
    whole = measured_at_100(course)
    assert whole[1] >= 4
    assert measured_at_100(resumed) == whole
    assert measured_at_100(forgetful) != whole


def test_a_layers_health_goes_on_and_its_counts_begin_anew():
    """As the document has it: what has to do with the process is not saved."""
    course = some_faults()
    before, after = course.layer.get_stats(), course.resumed().layer.get_stats()
    assert after["health"] == before["health"]
    assert before["execution_stats"]["fault_count"] > 0
    assert after["execution_stats"]["fault_count"] == 0


def test_a_layer_that_is_not_healthy_stays_closed():
    """The policy is told at once; a control forgets, and would let something grow there."""
    course = some_faults()
    resumed, forgetful = course.resumed(), course.resumed(forgets=True)
    for run in (resumed, forgetful):
        run.train(12)
    assert ("0",) in resumed.policy.unhealthy
    assert set(forgetful.policy.unhealthy) == {()}
    assert resumed.sink.of("health_changed") == []


def test_an_error_rate_leaves_the_history_from_before_the_stop():
    """What is usual was learned by the run that was saved; a control has to learn it first."""
    course = Course(has_kernel=True).train(300)
    told = []
    for run in (course.resumed(), course.resumed(forgets=True)):
        for _ in range(4):
            run.train(12).train(1, is_bad=True).train(12)
        told.append([(e.site, e.what) for e in run.sink.of("anomaly_seen")])
    assert told == [[("0", "error rate")], []]


def test_an_isolated_seed_is_probed_again_in_the_resumed_run(tmp_path, monkeypatch):
    """With the input that it was to be probed with; a control has none, and gives it up."""
    course = Course()
    course.layer.graft(0, KERNEL, alpha=0.5, example=torch.randn(8, 4))
    course.optimizer.param_groups[0]["params"] += list(course.layer.seed_kernel(0).parameters())
    course.train(10).train(4, is_bad=True)
    resumed = from_checkpoint(course, tmp_path / "one.pt")
    state = course.grower.state_dict()
    state["health"]["0"]["seeds"]["0"]["example"] = None
    course.grower.state_dict = lambda: state
    monkeypatch.setattr("esper.continuity.checkpoint.health_state", lambda layers: {})
    forgetful = from_checkpoint(course, tmp_path / "other.pt")
    ends = []
    for run in (course, resumed, forgetful):
        train(run.model, run.optimizer, 30, run.grower, random_seed=3)
        ends.append([e.outcome for e in run.sink.of("retried")])
    assert ends == [["recovered"], ["recovered"], ["given up"]]
    assert equal_states(state_of(course.model), state_of(resumed.model))


def from_checkpoint(course, path):
    made = Course()
    esper.save_checkpoint(path, course.model, course.optimizer, grower=course.grower)
    esper.load_checkpoint(path, made.model, made.optimizer, grower=made.grower)
    return made
