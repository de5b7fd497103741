"""Streams of several caches: one, however it is divided, and exact wherever it is resumed."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sklformat.format.mixture import Mixture
from sklformat.format.order import Schedule

GLOBAL = 12
WORLDS = st.sampled_from([1, 2, 3, 4, 6, 12])


@st.composite
def streams(draw):
    """The settings of a stream over one to six caches; its epochs are one step long to some dozens."""
    sizes = draw(
        st.lists(st.integers(1, 30) | st.integers(1, 150), min_size=1, max_size=6).filter(lambda s: sum(s) > 12)
    )
    weights = draw(st.none() | st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)))
    if weights is not None and sum(sizes) * min(weights) < sum(weights):
        weights = None  # one would give nothing
    return {
        "num_sequences": sum(sizes),
        "mixture": Mixture.of(sizes, weights),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "tail": draw(st.sampled_from(["drop", "pad", "wrap"])),
        **draw(st.sampled_from([{}, {"shuffle": False}, {"window": 5}, {"window": 1000}])),
    }


def steps_of(stream, epoch, consumed, world_size, num_workers=1):
    """The global stream from a place to the end of its epoch, step by step, as ranks and their workers make it."""
    ranks = []
    for rank in range(world_size):
        schedule = Schedule(batch_size=GLOBAL // world_size, rank=rank, world_size=world_size, **stream)
        shares = [schedule.batches(epoch, consumed, worker, num_workers) for worker in range(num_workers)]
        turns = itertools.chain.from_iterable(itertools.zip_longest(*shares))
        ranks.append([places.tolist() for places, _ in filter(None, turns)])
    return [list(itertools.chain(*step)) for step in zip(*ranks, strict=True)]


@given(streams(), WORLDS, st.integers(1, 4), st.integers(0, 2), st.data())
@settings(max_examples=30, deadline=None)
def test_any_division_and_any_resume_give_the_same_stream(stream, world_size, num_workers, epoch, data):
    """Ranks, workers and the place of a resume change nothing in what follows."""
    whole = steps_of(stream, epoch, 0, 1)
    assert whole == steps_of(stream, epoch, 0, world_size, num_workers)
    done = data.draw(st.integers(0, len(whole)))
    assert whole[done:] == steps_of(stream, epoch, done * GLOBAL, world_size, num_workers)


class Walks(RuleBasedStateMachine):
    """
    A run that is stopped, resumed on other ranks and goes from epoch to epoch.

    Of each cache it has seen every sequence equally often, or some once more, and never one twice more; with sequences
    dropped at the ends of epochs, apart from those.
    """

    @initialize(stream=streams().map(lambda s: s | {"tail": "pad"}))
    def begin(self, stream):
        self.stream, self.place, self.world = stream, (0, 0), 1
        sizes = stream["mixture"].sizes
        self.firsts = np.cumsum([0, *sizes])
        self.seen = np.zeros(sum(sizes), int)
        self.places = 0

    @rule(world=WORLDS)
    def move_to_other_ranks(self, world):
        self.world = world

    @precondition(lambda self: self.places < 4000)
    @rule(steps=st.integers(1, 40))
    def train(self, steps):
        """Up to so many steps, into the next epochs where one ends."""
        while steps > 0:
            epoch, consumed = self.place
            some = steps_of(self.stream, epoch, consumed, self.world)[:steps]
            for step in some:
                taken = np.array([place for place in step if place >= 0])
                self.seen += np.bincount(taken, minlength=self.seen.size)
                self.places += taken.size
                schedule = Schedule(batch_size=GLOBAL, **self.stream)
                self.place = schedule.after(*self.place)
            steps -= len(some)

    @invariant()
    def every_sequence_was_seen_before_any_came_again(self):
        for first, end in itertools.pairwise(self.firsts.tolist()):
            own = self.seen[first:end]
            assert own.max() - own.min() <= 1

    @invariant()
    def each_cache_had_its_share(self):
        """Within two sequences per halving of the list of caches, whatever number of epochs was seen."""
        mixture = self.stream["mixture"]
        for (first, end), share in zip(itertools.pairwise(self.firsts.tolist()), mixture.shares, strict=True):
            exact = self.places * share / mixture.num_sequences
            assert abs(self.seen[first:end].sum() - exact) <= 2 * np.ceil(np.log2(len(mixture.shares))) + 1e-6


TestWalks = Walks.TestCase
TestWalks.settings = settings(max_examples=10, stateful_step_count=12, deadline=None)
