"""The allocator against its rules on sizes that add up in the head, and against a slow obvious one on random steps."""

import json
import random
import subprocess
import sys
from itertools import groupby

import pytest

from memseg.errors import InputError
from memseg.profiling.allocator.caching import CachingAllocator, OutOfMemory
from memseg.profiling.allocator.replay import EMPTY_CACHE, FREE, REQUEST_FREE, Event, replay
from memseg.profiling.allocator.settings import AllocatorSettings

MIB = 2**20


def allocator(text="", capacity_mib=None):
    return CachingAllocator(AllocatorSettings.parse(text), None if capacity_mib is None else capacity_mib * MIB)


def address_of(key, of):
    return next(block.address for segment in of.segments() for block in segment.blocks if block.key == key)


@pytest.mark.parametrize(
    ("requested", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),  # The largest of the small pool.
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # 1 MiB is not split off in the large pool, 1 MiB and more is.
    ],
)
def test_a_first_request_gets_a_segment_by_its_size_and_what_is_worth_splitting_goes_back(
    requested, allocated, reserved
):
    one = allocator()
    assert one.malloc(0, requested) is None
    assert (one.requested_bytes, one.allocated_bytes, one.reserved_bytes) == (requested, allocated, reserved)
    assert one.active_bytes == allocated
    assert one.inactive_split_bytes == reserved - allocated


def test_the_smallest_cached_block_that_is_enough_is_taken_and_of_equals_the_lowest():
    one = allocator()
    for key, size in enumerate((14, 12, 10, 12)):
        one.malloc(key, size * MIB)
    second = address_of(1, one)
    for key in range(4):
        one.free(key)
    one.malloc(4, 11 * MIB)
    assert address_of(4, one) == second
    assert one.reserved_bytes == 48 * MIB


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0)])
def test_freed_neighbours_become_one_block_in_whatever_order(order):
    one = allocator()
    for key in range(3):
        one.malloc(key, 6 * MIB)
    assert [block.size_bytes // MIB for block in one.segments()[0].blocks] == [6, 6, 6, 2]
    for key in order:
        one.free(key)
    assert [(block.size_bytes, block.state) for block in one.segments()[0].blocks] == [(20 * MIB, "inactive")]
    assert (one.inactive_split_bytes, one.largest_free_block_bytes) == (0, 20 * MIB)
    one.empty_cache()
    assert (one.reserved_bytes, one.num_segments, one.segments()) == (0, 0, [])


def test_a_segment_that_is_used_in_part_is_not_given_back():
    one = allocator()
    one.malloc(0, 3 * MIB)
    one.malloc(1, 3 * MIB)
    one.free(0)
    one.empty_cache()
    assert one.reserved_bytes == 20 * MIB
    assert one.inactive_split_bytes == 17 * MIB


def test_what_was_freed_on_one_stream_serves_no_other():
    one = allocator()
    one.malloc(0, 12 * MIB, stream=1)
    one.free(0)
    one.malloc(1, 12 * MIB)
    assert one.reserved_bytes == 24 * MIB
    one.malloc(2, 12 * MIB, stream=1)
    assert one.reserved_bytes == 24 * MIB


def test_a_block_in_use_elsewhere_stays_active_and_comes_back_when_the_free_is_complete():
    one = allocator()
    one.malloc(0, 12 * MIB)
    one.request_free(0)
    assert (one.allocated_bytes, one.active_bytes, one.requested_bytes) == (0, 12 * MIB, 12 * MIB)
    one.malloc(1, 12 * MIB)
    assert one.reserved_bytes == 24 * MIB
    one.free(0)
    assert (one.allocated_bytes, one.active_bytes) == (12 * MIB, 12 * MIB)
    one.malloc(2, 12 * MIB)
    assert one.reserved_bytes == 24 * MIB


def test_at_the_limit_frees_that_wait_for_another_stream_are_waited_for():
    one = allocator(capacity_mib=20)
    one.malloc(0, 12 * MIB)
    one.request_free(0)
    assert one.malloc(1, 14 * MIB) is None
    assert (one.active_bytes, one.reserved_bytes) == (14 * MIB, 14 * MIB)
    one.free(0)  # The trace says so later.
    assert one.active_bytes == 14 * MIB


def test_nothing_is_taken_for_nothing():
    one = allocator()
    one.malloc(0, 0)
    one.free(0)
    assert one.reserved_bytes == 0


def test_keys_are_held_to():
    one = allocator()
    one.malloc(0, 1)
    with pytest.raises(ValueError, match="key 0"):
        one.malloc(0, 1)
    with pytest.raises(ValueError, match="-5 bytes"):
        one.malloc(1, -5)
    one.free(0)
    with pytest.raises(KeyError):
        one.free(0)


def test_cached_memory_is_given_back_before_the_limit_refuses():
    one = allocator(capacity_mib=40)
    one.malloc(0, 20 * MIB)
    one.free(0)
    assert one.malloc(1, 30 * MIB) is None
    assert one.reserved_bytes == 30 * MIB
    assert one.malloc(2, 12 * MIB) == OutOfMemory(12 * MIB, 12 * MIB, 10 * MIB, 30 * MIB, 30 * MIB, 0)
    assert one.malloc(3, 10 * MIB) is None


def test_a_memory_fraction_limits_like_a_smaller_card():
    one = allocator("per_process_memory_fraction:0.5", capacity_mib=80)
    assert one.malloc(0, 40 * MIB) is None
    refused = one.malloc(1, 1)
    assert (refused.needed_bytes, refused.free_bytes) == (2 * MIB, 0)


def test_blocks_from_max_split_size_on_are_neither_split_nor_given_to_smaller_requests():
    one = allocator("max_split_size_mb:20")
    one.malloc(0, 40 * MIB)
    one.free(0)
    one.malloc(1, 12 * MIB)  # Less than 20: may not have a block that must stay whole.
    assert one.reserved_bytes == 52 * MIB
    one.malloc(2, 20 * MIB)  # 40 is 20 or more too large.
    assert one.reserved_bytes == 72 * MIB
    one.malloc(3, 21 * MIB)
    assert (one.reserved_bytes, one.allocated_bytes) == (72 * MIB, 72 * MIB)


def test_at_the_limit_one_whole_block_that_is_enough_is_given_back_and_no_more():
    one = allocator("max_split_size_mb:20", capacity_mib=150)
    for key, size in enumerate((24, 60, 62)):
        one.malloc(key, size * MIB)
    for key in range(3):
        one.free(key)
    one.malloc(3, 30 * MIB)  # 60 would waste 20 or more; it makes room.
    assert one.reserved_bytes == (24 + 62 + 30) * MIB


def test_at_the_limit_several_whole_blocks_are_given_back_largest_first():
    one = allocator("max_split_size_mb:20", capacity_mib=100)
    for key, size in enumerate((24, 26, 28, 12)):
        one.malloc(key, size * MIB)
    for key in range(4):
        one.free(key)
    one.malloc(4, 50 * MIB)  # 28 and 26 go.
    assert one.reserved_bytes == (24 + 12 + 50) * MIB


def test_garbage_collection_gives_back_what_waited_longest():
    # Allowed are 80 MiB, the threshold is 40. At the third request 20 and 30 are cached, 2 and 1 searches old.
    text = "per_process_memory_fraction:0.8,garbage_collection_threshold:0.5"
    one = allocator(text, capacity_mib=100)
    for key, size in enumerate((20, 30, 40)):
        one.malloc(key, size * MIB)
        one.free(key)
    assert one.reserved_bytes == 70 * MIB
    # Without it the limit gives all back at once.
    other = allocator("per_process_memory_fraction:0.8", capacity_mib=100)
    for key, size in enumerate((20, 30, 40)):
        other.malloc(key, size * MIB)
        other.free(key)
    assert other.reserved_bytes == 40 * MIB


def test_an_expandable_segment_grows_by_pages_behind_what_is_free():
    one = allocator("expandable_segments:True")
    one.malloc(0, 3 * MIB)
    one.malloc(1, 30 * MIB)  # 17 are free, 13 are missing: one page more.
    assert (one.allocated_bytes, one.reserved_bytes, one.num_segments) == (33 * MIB, 40 * MIB, 1)
    one.malloc(2, 1)
    assert (one.reserved_bytes, one.num_segments) == (42 * MIB, 2)
    assert [segment.size_bytes // MIB for segment in one.segments()] == [40, 2]
    fixed = allocator()
    for key, size in enumerate((3 * MIB, 30 * MIB, 1)):
        fixed.malloc(key, size)
    assert fixed.reserved_bytes == 52 * MIB


def test_pages_that_are_wholly_free_are_given_back_and_filled_again_from_below():
    one = allocator("expandable_segments:True")
    for key in range(3):
        one.malloc(key, 20 * MIB)
    middle = address_of(1, one)
    one.free(1)
    one.empty_cache()
    assert one.reserved_bytes == 40 * MIB
    assert [segment.size_bytes // MIB for segment in one.segments()] == [20, 20]
    one.malloc(3, 19 * MIB)
    assert (one.reserved_bytes, address_of(3, one)) == (60 * MIB, middle)


def test_a_page_that_is_used_in_part_stays():
    one = allocator("expandable_segments:True")
    one.malloc(0, 30 * MIB)
    one.malloc(1, 3 * MIB)
    one.free(0)
    one.empty_cache()  # Free are 0 to 30 and 33 to 40; only the first page lies in there.
    assert one.reserved_bytes == 20 * MIB
    one.free(1)
    one.empty_cache()
    assert (one.reserved_bytes, one.num_segments, one.segments()) == (0, 0, [])


def test_the_end_of_an_expandable_segment_is_used_last():
    # Free are 12 MiB in the middle and 8 before unmapped addresses, which count as endless.
    one = allocator("expandable_segments:True")
    for key, size in enumerate((12, 20)):
        one.malloc(key, size * MIB)
    first = address_of(0, one)
    one.free(0)
    one.malloc(2, 6 * MIB)
    assert address_of(2, one) == first


def test_pages_are_refused_beyond_the_capacity():
    one = allocator("expandable_segments:True", capacity_mib=50)
    one.malloc(0, 20 * MIB)
    refused = one.malloc(1, 30 * MIB)
    assert (refused.needed_bytes, refused.free_bytes, refused.reserved_bytes) == (30 * MIB, 30 * MIB, 20 * MIB)
    assert one.malloc(2, 20 * MIB) is None


def test_a_memory_fraction_counts_a_whole_segment_where_a_page_would_do():
    # 3 MiB would fit into the page, but 17 are free; 18 need a page, and 20 + 18 are more than the 37 allowed.
    one = allocator("expandable_segments:True,per_process_memory_fraction:0.37", capacity_mib=100)
    one.malloc(0, 3 * MIB)
    assert one.malloc(1, 18 * MIB).free_bytes == 17 * MIB


def test_powers_of_two_are_divided_from_their_boundary_on():
    settings = AllocatorSettings.parse("roundup_power2_divisions:[256:1,512:2,1024:4,>:8]")
    assert settings.roundup_power2_divisions == (1,) * 9 + (2, 4) + (8,) * 5  # As torch 2.14.1 itself answers.
    assert settings.rounded(600 * MIB) == 768 * MIB
    assert settings.rounded(1200 * MIB) == 1280 * MIB
    assert settings.rounded(2049 * MIB) == 2304 * MIB
    assert settings.rounded(300 * MIB + 1) == 300 * MIB + 512
    one = allocator("roundup_power2_divisions:4")
    one.malloc(0, 1200 * MIB)
    assert (one.requested_bytes, one.allocated_bytes) == (1200 * MIB, 1280 * MIB)


@pytest.mark.parametrize(
    ("text", "divisions"),
    [
        ("[4:2,>:1]", (2, 2, 2) + (1,) * 13),
        ("[4:2]", (2, 2, 2) + (0,) * 13),
        ("[>:4]", (0,) + (4,) * 15),
        ("[4:2,2:8]", (2, 8, 2) + (0,) * 13),
        ("[1048576:8]", (8,) * 16),
        ("[]", (0,) * 16),
    ],
)
def test_divisions_are_read_as_torch_reads_them(text, divisions):
    # What c10's roundup_power2_divisions(size) of torch 2.14.1 answered after setAllocatorSettings.
    assert AllocatorSettings.parse(f"roundup_power2_divisions:{text}").roundup_power2_divisions == divisions


def test_the_text_of_settings_gives_them_back():
    for text in (
        "",
        "expandable_segments:True,max_split_size_mb:128,garbage_collection_threshold:0.8",
        "roundup_power2_divisions:[256:1,512:2,>:4],large_segment_size_mb:32,max_non_split_rounding_mb:40",
    ):
        settings = AllocatorSettings.parse(text)
        assert AllocatorSettings.parse(settings.text) == settings
    assert AllocatorSettings.parse(" max_split_size_mb : 40 , ").text == "max_split_size_mb:40"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("max_split_size:128", "max_split_size: unknown key; did you mean max_split_size_mb?"),
        ("colour:red", "colour: unknown key; known: expandable_segments, max_split_size_mb"),
        ("max_split_size_mb=128", "max_split_size_mb=128: must be key:value"),
        ("max_split_size_mb:128abc", "max_split_size_mb: must be a whole number above 0, got 128abc"),
        ("max_split_size_mb:5", "max_split_size_mb: must be 20 (a large segment) or more, got 5"),
        ("expandable_segments:true", "expandable_segments: must be True or False, got true"),
        ("garbage_collection_threshold:1.0", "must be more than 0 and less than 1, got 1.0"),
        ("per_process_memory_fraction:nan", "must be a number from 0 to 1, got nan"),
        ("roundup_power2_divisions:[256:3]", "all powers of two, got [256:3]"),
        ("backend:cudaMallocAsync", "not modelled, got cudaMallocAsync"),
        ("large_segment_size_mb:10", "large_segment_size_mb: must be more than 10, got 10"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_it_must_be(text, told):
    with pytest.raises(InputError) as refused:
        AllocatorSettings.parse(text)
    assert told in str(refused.value)


def test_all_wrong_settings_are_told_at_once():
    with pytest.raises(InputError, match="2 problems"):
        AllocatorSettings.parse("max_split:1,expandable_segments:1")


def test_torch_accepts_what_is_accepted_here_and_refuses_what_is_out_of_range():
    good = [
        "",
        "expandable_segments:True,max_split_size_mb:128",
        "roundup_power2_divisions:[256:1,512:2,>:4],garbage_collection_threshold:0.8",
        "max_non_split_rounding_mb:20,per_process_memory_fraction:0.5",
        "backend:native,pinned_use_background_threads:True,pinned_num_register_threads:8",
        "throw_on_cudamalloc_oom:False,release_lock_on_cudamalloc:True,pinned_max_cached_size_mb:3",
        "large_segment_size_mb:32 , max_split_size_mb:32,",
    ]
    bad = [
        "foo:1",
        "max_split_size_mb:5",
        "large_segment_size_mb:32,max_split_size_mb:20",
        "expandable_segments:true",
        "garbage_collection_threshold:0",
        "per_process_memory_fraction:2",
        "roundup_power2_divisions:3",
        "roundup_power2_divisions:[3:4]",
    ]
    # In another process: options stay set, and so the size of large segments comes last.
    code = """
import json, sys, torch
def accepts(text):
    try:
        torch._C._accelerator_setAllocatorSettings(text)
    except ValueError:
        return False
    return True
print(json.dumps([accepts(text) for text in json.loads(sys.argv[1])]))
"""
    command = [sys.executable, "-c", code, json.dumps(good + bad)]
    answers = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert answers == [True] * len(good) + [False] * len(bad)
    for text in good:
        AllocatorSettings.parse(text)
    for text in bad:
        with pytest.raises(InputError):
            AllocatorSettings.parse(text)


def test_a_replay_tells_each_peak_and_when_it_was_reached():
    found = replay(
        [
            Event(0, 3 * MIB),  # 20 reserved.
            Event(1, 12 * MIB),  # From the same segment.
            Event(1, FREE),
            Event(2, 18 * MIB),  # Only 17 are free: 38 reserved.
            Event(0, FREE),
            Event(9, EMPTY_CACHE),  # The first segment goes.
            Event(2, REQUEST_FREE),
            Event(0, 2 * MIB),
        ]
    )
    assert (found.peak_allocated_bytes, found.peak_allocated_event) == (21 * MIB, 3)
    assert (found.peak_requested_bytes, found.peak_requested_event) == (21 * MIB, 3)
    assert (found.peak_active_bytes, found.peak_active_event) == (21 * MIB, 3)
    assert (found.peak_reserved_bytes, found.peak_reserved_event) == (38 * MIB, 3)
    assert (found.unallocated_bytes, found.largest_free_block_bytes, found.num_segments) == (17 * MIB, 17 * MIB, 2)
    assert (found.allocated_curve // MIB).tolist() == [3, 15, 3, 21, 18, 18, 0, 2]
    assert (found.reserved_curve // MIB).tolist() == [20, 20, 20, 38, 38, 18, 18, 38]
    assert (found.out_of_memory, found.out_of_memory_event) == (None, None)


def test_a_replay_ends_where_memory_does():
    found = replay([Event(0, 12 * MIB), Event(1, 12 * MIB), Event(2, 12 * MIB), Event(0, FREE)], None, 30 * MIB)
    assert found.out_of_memory_event == 2
    assert found.out_of_memory.free_bytes == 6 * MIB
    assert len(found.reserved_curve) == 2


def test_a_replay_of_nothing_is_nothing():
    found = replay([])
    assert (found.peak_reserved_bytes, found.reserved_curve.tolist(), found.num_segments) == (0, [], 0)


class ObviousAllocator:
    """Fixed segments by the rules alone: segments are lists of [size, key or None], searched from end to end."""

    def __init__(self, max_split, capacity):
        self.segments = []
        self.max_split, self.capacity = max_split, capacity

    @property
    def reserved(self):
        return sum(size for segment in self.segments for size, _ in segment["blocks"])

    @property
    def allocated(self):
        return sum(size for segment in self.segments for size, key in segment["blocks"] if key is not None)

    def malloc(self, key, requested):
        size = -(-requested // 512) * 512
        small = size <= MIB
        return self.place(key, size, small) or (self.extend(size, small) and self.place(key, size, small, fresh=True))

    def extend(self, size, small):
        need = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        fits = self.reserved + need <= self.capacity
        # As in the source everything goes where too few whole blocks went, even if there is room by now.
        if not fits and not (
            self.make_room(max(size, self.max_split), small) and self.reserved + need <= self.capacity
        ):
            self.segments = [one for one in self.segments if [key for _, key in one["blocks"]] != [None]]
        if self.reserved + need > self.capacity:
            return False
        self.segments.append({"small": small, "blocks": [[need, None]]})
        return True

    def make_room(self, goal, small):
        whole = [
            one
            for one in self.segments
            if one["small"] == small
            and [key for _, key in one["blocks"]] == [None]
            and one["blocks"][0][0] >= self.max_split
        ]
        whole.sort(key=lambda one: one["blocks"][0][0])
        enough = [one for one in whole if one["blocks"][0][0] >= goal]
        given = 0
        for one in enough[:1] or whole[::-1]:
            if given < goal:
                given += one["blocks"][0][0]
                self.segments = [other for other in self.segments if other is not one]
        return given >= goal

    def place(self, key, size, small, fresh=False):
        free = [
            (block[0], place, index)
            for place, one in enumerate(self.segments)
            for index, block in enumerate(one["blocks"])
            if one["small"] == small and block[1] is None and block[0] >= size
        ]
        if fresh:
            free = [found for found in free if found[1] == len(self.segments) - 1]
        if not free:
            return False
        found, place, index = min(free)
        limit = self.max_split if size < self.max_split else size + 20 * MIB
        if not fresh and found >= limit:
            return False
        blocks = self.segments[place]["blocks"]
        rest = found - size
        if rest >= 512 if small else size < self.max_split and rest > MIB:
            blocks[index : index + 1] = [[size, key], [rest, None]]
        else:
            blocks[index][1] = key
        return True

    def free(self, key):
        for one in self.segments:
            merged = []
            for size, owner in one["blocks"]:
                owner = None if owner == key else owner
                if merged and owner is None and merged[-1][1] is None:
                    merged[-1][0] += size
                else:
                    merged.append([size, owner])
            one["blocks"] = merged


def random_size(draw):
    return (
        int(2 ** draw.uniform(0, 26)) if draw.random() < 0.8 else draw.choice((512, MIB, 10 * MIB, 20 * MIB, 40 * MIB))
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("max_split_mib", "capacity_mib"), [(None, 10**6), (None, 300), (20, 10**6), (24, 300)])
def test_every_decision_is_that_of_an_obvious_allocator(seed, max_split_mib, capacity_mib):
    draw = random.Random(seed)
    ours = allocator(f"max_split_size_mb:{max_split_mib}" if max_split_mib else "", capacity_mib)
    obvious = ObviousAllocator((max_split_mib or 2**50) * MIB, capacity_mib * MIB)
    alive = []
    for key in range(400):
        size = random_size(draw)
        fits = obvious.malloc(key, size)
        assert (ours.malloc(key, size) is None) == fits
        if fits:
            alive.append(key)
        while alive and (draw.random() < 0.4 or not fits):
            freed = alive.pop(draw.randrange(len(alive)))
            ours.free(freed)
            obvious.free(freed)
            if not fits and draw.random() < 0.5:
                break
        assert (ours.allocated_bytes, ours.reserved_bytes) == (obvious.allocated, obvious.reserved)
        assert [[[block.size_bytes, block.key] for block in segment.blocks] for segment in ours.segments()] == [
            one["blocks"] for one in obvious.segments
        ]


class ObviousExpandable:
    """One expandable segment of the large pool, MiB by MiB: who has it, and which pages of 20 are there."""

    def __init__(self):
        self.owner = [None] * 1000
        self.pages = [False] * 50

    def free_runs(self):
        """(first, MiB, whether there are pages) of what nobody has."""
        runs, start = [], 0
        for (owner, mapped), group in groupby(range(1000), lambda mib: (self.owner[mib], self.pages[mib // 20])):
            size = len(list(group))
            if owner is None:
                runs.append((start, size, mapped))
            start += size
        return runs

    def malloc(self, key, mib):
        runs = self.free_runs()
        unmapped = {start: size for start, size, mapped in runs if not mapped}
        fits = sorted(
            (size, start, size + unmapped.get(start + size, 0))
            for start, size, mapped in runs
            if mapped and size >= mib
        )
        while len(fits) > 1 and fits[1][2] < fits[0][2]:
            del fits[0]
        if fits:
            place = fits[0][1]
        else:
            before = {start + size: start for start, size, mapped in runs if mapped}
            places = (before.get(start, start) for start in unmapped)
            place = next(place for place in places if self.owner[place : place + mib] == [None] * mib)
        for taken in range(place, place + mib):
            self.owner[taken] = key
            self.pages[taken // 20] = True

    def free(self, key):
        self.owner = [None if owner == key else owner for owner in self.owner]

    def empty_cache(self):
        self.pages = [any(owner is not None for owner in self.owner[mib : mib + 20]) for mib in range(0, 1000, 20)]


@pytest.mark.parametrize("seed", range(3))
def test_pages_come_and_go_as_in_an_obvious_allocator(seed):
    draw = random.Random(seed)
    ours, obvious = allocator("expandable_segments:True"), ObviousExpandable()
    alive = []
    for key in range(120):
        size = draw.choice((2, 3, 5, 11, 19, 20, 25, 45))
        ours.malloc(key, size * MIB)
        obvious.malloc(key, size)
        alive.append(key)
        while alive and draw.random() < 0.45:
            freed = alive.pop(draw.randrange(len(alive)))
            ours.free(freed)
            obvious.free(freed)
        if draw.random() < 0.15:
            ours.empty_cache()
            obvious.empty_cache()
        assert ours.reserved_bytes == 20 * MIB * sum(obvious.pages)
        if alive:
            start = obvious.owner.index(alive[-1])
            base = address_of(alive[-1], ours) - start * MIB
            assert {key: (address_of(key, ours) - base) // MIB for key in alive} == {
                key: obvious.owner.index(key) for key in alive
            }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "text",
    [
        "",
        "expandable_segments:True",
        "max_split_size_mb:32",
        "expandable_segments:True,max_split_size_mb:32,large_segment_size_mb:24",
        "roundup_power2_divisions:4",
        "per_process_memory_fraction:0.9,garbage_collection_threshold:0.5",
        "per_process_memory_fraction:0.9,expandable_segments:True",
    ],
)
def test_blocks_never_overlap_and_all_comes_back_in_the_end(seed, text):
    draw = random.Random(seed)
    one = allocator(text, 400)
    alive, pending = [], []
    for key in range(500):
        if one.malloc(key, random_size(draw), draw.randrange(2)) is None:
            alive.append(key)
        for _ in range(draw.randrange(3)):
            if alive:
                freed = alive.pop(draw.randrange(len(alive)))
                if draw.random() < 0.2:
                    one.request_free(freed)
                    pending.append(freed)
                else:
                    one.free(freed)
        if pending and draw.random() < 0.3:
            one.free(pending.pop())
        if draw.random() < 0.02:
            one.empty_cache()
        segments = one.segments()
        end = 0
        for segment in segments:
            for block in segment.blocks:
                assert block.address >= end
                end = block.address + block.size_bytes
            assert end == segment.address + segment.size_bytes
        blocks = [block for segment in segments for block in segment.blocks]
        assert one.reserved_bytes == sum(block.size_bytes for block in blocks)
        assert one.active_bytes == sum(block.size_bytes for block in blocks if block.state != "inactive")
        assert one.requested_bytes == sum(block.requested_bytes for block in blocks)
        assert {block.key for block in blocks if block.state == "active_allocated"} == set(alive)
        assert one.requested_bytes <= one.active_bytes <= one.reserved_bytes <= one.peak_reserved_bytes <= 400 * MIB
        assert one.allocated_bytes <= one.active_bytes
    for key in alive + pending:
        one.free(key)
    one.empty_cache()
    assert (one.allocated_bytes, one.active_bytes, one.requested_bytes, one.reserved_bytes) == (0, 0, 0, 0)
    assert (one.segments(), one.num_segments) == ([], 0)
