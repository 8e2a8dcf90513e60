"""Ray's pages of text become one line each."""

from milliways.cluster.ray.notices import notice_of


def test_short_memory_is_said_in_one_sentence() -> None:
    page = (
        "\n\n2 worker(s) were killed due to the node running low on memory. 1 actor died.\n"
        "To see more information about the memory usage on this node, use `ray logs raylet.out`\n"
    )
    said = notice_of(page)
    assert said.startswith("memory is short: Ray's memory monitor ended 2 of our processes.")
    assert "\n" not in said and "RAY_memory_usage_threshold" in said


def test_other_messages_keep_their_first_line() -> None:
    assert notice_of("\n The node is dead \n [state-dump] NodeManager\n") == "Ray: The node is dead"
    assert notice_of(" \n") == ""
