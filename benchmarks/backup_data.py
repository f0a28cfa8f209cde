"""The data that phase 1 is measured with: a database and an application's files, of two kinds."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg

MB = 1 << 20

# TPC-H, specification 3.0.1, clause 1.4: what decision support is measured with; one scale factor is about 1 GB.
_TPCH = {
    "region": "r_regionkey int PRIMARY KEY, r_name char(25), r_comment varchar(152)",
    "nation": "n_nationkey int PRIMARY KEY, n_name char(25), n_regionkey int, n_comment varchar(152)",
    "part": "p_partkey bigint PRIMARY KEY, p_name varchar(55), p_mfgr char(25), p_brand char(10), p_type varchar(25), p_size int,"
    " p_container char(10), p_retailprice numeric(15,2), p_comment varchar(23)",
    "supplier": "s_suppkey bigint PRIMARY KEY, s_name char(25), s_address varchar(40), s_nationkey int, s_phone char(15),"
    " s_acctbal numeric(15,2), s_comment varchar(101)",
    "partsupp": "ps_partkey bigint, ps_suppkey bigint, ps_availqty int, ps_supplycost numeric(15,2), ps_comment varchar(199),"
    " PRIMARY KEY (ps_partkey, ps_suppkey)",
    "customer": "c_custkey bigint PRIMARY KEY, c_name varchar(25), c_address varchar(40), c_nationkey int, c_phone char(15),"
    " c_acctbal numeric(15,2), c_mktsegment char(10), c_comment varchar(117)",
    "orders": "o_orderkey bigint PRIMARY KEY, o_custkey bigint, o_orderstatus char(1), o_totalprice numeric(15,2), o_orderdate date,"
    " o_orderpriority char(15), o_clerk char(15), o_shippriority int, o_comment varchar(79)",
    "lineitem": "l_orderkey bigint, l_partkey bigint, l_suppkey bigint, l_linenumber int, l_quantity numeric(15,2),"
    " l_extendedprice numeric(15,2), l_discount numeric(15,2), l_tax numeric(15,2), l_returnflag char(1), l_linestatus char(1),"
    " l_shipdate date, l_commitdate date, l_receiptdate date, l_shipinstruct char(25), l_shipmode char(10), l_comment varchar(44),"
    " PRIMARY KEY (l_orderkey, l_linenumber)",
}
_MB_PER_SCALE = 1300

_RANDOM = (
    (
        "CREATE TABLE orders (id bigint PRIMARY KEY, customer int, cents int, state text, placed timestamptz)",
        """INSERT INTO orders SELECT n, n % 100003, (n::bigint * 7919) % 100000, (ARRAY['new', 'paid', 'sent'])[1 + n % 3],
           '2026-01-01'::timestamptz + n * interval '7 seconds' FROM generate_series(1, {rows}) n""",
        4000,
    ),
    (
        "CREATE TABLE events (id bigint PRIMARY KEY, at timestamptz, kind text, detail text)",
        """INSERT INTO events SELECT n, '2026-01-01'::timestamptz + n * interval '1 second', 'kind ' || n % 40,
           md5(n::text) || ' GET /products/' || n % 5000 || ' 200 ' || md5((n + 1)::text) || ' Mozilla/5.0 (X11; Linux x86_64)'
           FROM generate_series(1, {rows}) n""",
        1800,
    ),
    (
        "CREATE TABLE documents (id bigint PRIMARY KEY, title text, body text)",
        """INSERT INTO documents SELECT n, 'Document ' || n,
           (SELECT string_agg(md5((n * 1000 + k)::text) || ' lorem ipsum dolor sit amet ', '') FROM generate_series(1, 50) k)
           FROM generate_series(1, {rows}) n""",
        130,
    ),
)
_RANDOM_INDEXES = ("CREATE INDEX ON orders (customer)", "CREATE INDEX ON events (at)")


def tpch_database(session: psycopg.Connection[Any], megabytes: int) -> None:
    """TPC-H's tables with its own text, as its generator writes them."""
    program = shutil.which("tpchgen-cli", path=str(Path(sys.executable).parent)) or shutil.which("tpchgen-cli")
    if program is None:
        sys.exit("tpchgen-cli is not installed: pip install 'tpchgen-cli>=4', or measure with --data random")
    with tempfile.TemporaryDirectory() as folder:
        scale = f"{megabytes / _MB_PER_SCALE:.3f}"
        subprocess.run((program, "csv", "-s", scale, f"--output-dir={folder}"), check=True, stdout=subprocess.DEVNULL)
        for table, columns in _TPCH.items():
            session.execute(f"CREATE TABLE {table} ({columns})")  # type: ignore[arg-type]  # constants
            with (
                (Path(folder) / f"{table}.csv").open("rb") as file,
                session.cursor().copy(f"COPY {table} FROM STDIN (FORMAT csv, HEADER)") as copy,  # type: ignore[arg-type]
            ):
                while block := file.read(MB):
                    copy.write(block)


def installed_files(home: Path, megabytes: int) -> None:
    """What is installed beside this Python, and uploads.

    Three quarters are the former, as an application's dependencies lie on its host: sources, libraries, fonts, thousands of
    small ones. A quarter is what was compressed before, as uploads are.
    """
    wanted, copied, round_ = megabytes * MB * 3 // 4, 0, 0
    there = [path for path in sorted(Path(sys.prefix).rglob("*")) if path.is_file() and not path.is_symlink()]
    while copied < wanted:
        for path in there:
            into = home / f"release-{round_}" / path.relative_to(sys.prefix)
            into.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, into)
            copied += path.stat().st_size
            if copied >= wanted:
                break
        round_ += 1
        if not copied:
            sys.exit(f"{sys.prefix} holds no files: measure in a virtual environment, or with --data random")
    draw = random.Random(7)
    (home / "uploads").mkdir()
    for number in range(4 * (megabytes - copied // MB)):
        (home / "uploads" / f"{number}.jpg").write_bytes(draw.randbytes(MB // 4))


def random_database(session: psycopg.Connection[Any], megabytes: int) -> None:
    """Rows more than half of which are hexadecimal digits of digests: nothing repeats, and little is saved."""
    for table, rows, per_mb in _RANDOM:
        session.execute(table)  # type: ignore[arg-type]  # constants
        session.execute(rows.format(rows=per_mb * megabytes))  # type: ignore[arg-type]
    for index in _RANDOM_INDEXES:
        session.execute(index)  # type: ignore[arg-type]


def random_files(home: Path, megabytes: int) -> None:
    """Files of 1 MB: half of random words, half of random bytes."""
    draw = random.Random(7)
    words = [f"{draw.randrange(1 << 24):x}" for _ in range(4000)]
    for number in range(megabytes):
        folder = home / f"release-{number % 40}"
        folder.mkdir(exist_ok=True)
        text = " ".join(draw.choices(words, k=160_000)).encode()[:MB]
        (folder / f"file-{number}").write_bytes(text if number % 2 else draw.randbytes(MB))


Maker = tuple[Callable[[psycopg.Connection[Any], int], None], Callable[[Path, int], None]]
KINDS: dict[str, Maker] = {"usual": (tpch_database, installed_files), "random": (random_database, random_files)}
