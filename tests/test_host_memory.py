"""What memory is to be had, by the kernel's tables: the machine's, or a container's."""

from cogvideox_factory.host_memory import available_memory

GIB = 2**30


def tables(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MACHINE = {"proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemAvailable:   {40 * 2**20} kB\n"}


def test_a_machine_without_a_limit_has_what_it_says(tmp_path):
    assert available_memory(tmp_path) is None
    assert available_memory(tables(tmp_path, MACHINE)) == 40 * GIB
    assert available_memory(tables(tmp_path, {"sys/fs/cgroup/memory.max": "max\n"})) == 40 * GIB


def test_a_container_has_what_its_limit_leaves_and_files_in_memory_are_no_loss(tmp_path):
    group = {
        "memory.max": f"{8 * GIB}\n", "memory.current": f"{5 * GIB}\n",
        "memory.stat": f"anon {2 * GIB}\nfile {3 * GIB}\ninactive_file {2 * GIB}\n",
    }  # fmt: skip
    root = tables(tmp_path, MACHINE | {f"sys/fs/cgroup/{name}": text for name, text in group.items()})
    assert available_memory(root) == 5 * GIB
    assert available_memory(tables(root, {"sys/fs/cgroup/memory.max": f"{100 * GIB}\n"})) == 40 * GIB
    assert available_memory(tables(root, {"sys/fs/cgroup/memory.max": f"{GIB}\n"})) == 0


def test_so_has_one_of_the_first_kind(tmp_path):
    group = {
        "limit_in_bytes": f"{8 * GIB}\n", "usage_in_bytes": f"{6 * GIB}\n", "stat": f"total_inactive_file {GIB}\n"
    }  # fmt: skip
    root = tables(tmp_path, MACHINE | {f"sys/fs/cgroup/memory/memory.{name}": text for name, text in group.items()})
    assert available_memory(root) == 3 * GIB
