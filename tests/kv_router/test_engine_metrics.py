"""The figures of engines' metrics pages, by the names of the model server protocol."""

import pytest
from dynamo_kv_router.engine_metrics import EngineFigures, figures

PAGES = {
    "vllm": """
vllm:num_requests_running{model_name="m"} 3.0
vllm:num_requests_waiting{model_name="m"} 2.0
vllm:kv_cache_usage_perc{model_name="m"} 0.25
""",
    "sglang": """
sglang:num_running_reqs{model_name="m"} 3.0
sglang:num_queue_reqs{model_name="m"} 2.0
sglang:token_usage{model_name="m"} 0.25
""",
    "trtllm-serve": """
trtllm_num_requests_running 3.0
trtllm_num_requests_waiting 2.0
trtllm_kv_cache_utilization 0.25
""",
    "trt-llm behind triton": """
nv_trt_llm_request_metrics{model="m",request_type="scheduled",version="1"} 3
nv_trt_llm_request_metrics{model="m",request_type="waiting",version="1"} 2
nv_trt_llm_request_metrics{model="m",request_type="max",version="1"} 64
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction",model="m"} 0.25
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="m"} 100
""",
}


@pytest.mark.parametrize("engine", PAGES)
def test_each_engine_by_its_names(engine: str) -> None:
    assert figures(PAGES[engine]) == EngineFigures(3, 2, 0.25, 0.0)


def test_ranks_are_summed_and_their_cache_use_averaged() -> None:
    page = PAGES["vllm"] + PAGES["vllm"].replace("0.25", "0.75").replace("3.0", "1.0")
    assert figures(page) == EngineFigures(4, 4, 0.5, 0.0)


def test_the_newest_series_of_adapters_counts() -> None:
    series = (
        'vllm:lora_requests_info{{max_lora="4",running_lora_adapters="{}",'
        'waiting_lora_adapters="{}"}} {}\n'
    )
    page = PAGES["vllm"] + series.format("old", "", 1e9) + series.format("a, b", "c", 2e9)
    page += series.format("older", "older", 0.5e9)
    found = figures(page)
    assert found is not None
    assert (found.loras_running, found.loras_waiting, found.max_loras) == ({"a", "b"}, {"c"}, 4)


def test_a_page_without_them_has_no_figures() -> None:
    assert figures("process_cpu_seconds_total 1.0\n") is None


def test_a_time_stamp_is_no_figure() -> None:
    page = (
        'vllm:num_requests_running{engine="0",model_name="a} b"} 3.0 1700000000000\n'
        "vllm:num_requests_waiting 2 1700000000000\n"
    )
    found = figures(page)
    assert found is not None
    assert (found.running, found.waiting) == (3, 2)
