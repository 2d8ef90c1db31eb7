"""What each flag of a row means; the text of a flag adds what was observed and the limit that it crossed."""

from __future__ import annotations

from typing import Final

FLAG_MEANING: Final[dict[str, str]] = {
    "cache_not_cold": "flushing the cache made no difference, so cold times may be hot ones",
    "changed_settings": "the impl changed global settings of torch, which were put back",
    "clock_spread": "the clock of the device moved while samples were taken",
    "context_switches": "the process was taken off its CPU while samples were taken",
    "events_disagree": "calls in a row took longer on the wall clock than by the device's events",
    "faster_than_physics": "less time than the roofline of the device allows",
    "few_samples": "fewer samples than the protocol asks for",
    "hidden_saved": "the forward held memory that autograd was not told of, or less than was saved",
    "host_sync": "the call waits for the device",
    "kernels_unseen": "the profiler saw no kernel of the call",
    "launch_exposed": "the device was ahead of the host, so that samples hold gaps between launches",
    "leaked_processes": "processes that the impl started were still running; they were ended",
    "load": "more work than CPUs on this machine",
    "multimodal": "samples fall into groups, so that their median says little",
    "not_converged": "the interval of the median is wider than the protocol asks for",
    "not_warm": "times had not settled when sampling began",
    "outside_allocator": "the call took memory past torch's allocator, which mem_* do not count",
    "parameters": "the mechanism adds more than a tenth to the model with softmax attention",
    "power_capped": "the device was held back by its power limit",
    "random_state": "a call changed torch's random state, and the Spec does not say so",
    "recompiled": "something was compiled while sampling; all samples were taken again",
    "shared_device": "other processes computed on the device",
    "side_threads": "more threads computed than were asked for",
    "steal": "the hypervisor gave the CPU to another machine meanwhile",
    "stopped_early": "the training ran out of time before its last step",
    "thermal": "the device was held back by its temperature",
    "unpinned": "threads could wander between CPUs",
}
"""Name → meaning, in alphabetical order."""
