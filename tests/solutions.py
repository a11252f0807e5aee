"""Solutions of MultiPL-E problems written by hand: name -> what follows the prompt.

A C++ solution leaves out the last brace, with which the tests begin.
"""

from __future__ import annotations

JAVASCRIPT = {
    "HumanEval_53_add": "  return x + y;\n}\n",
    "HumanEval_55_fib": "  return n < 2 ? n : fib(n - 1) + fib(n - 2);\n}\n",
    "HumanEval_23_strlen": "  return string.length;\n}\n",
    "HumanEval_45_triangle_area": "  return a * h / 2;\n}\n",
    "HumanEval_24_largest_divisor": (
        "  for (let d = n - 1; d > 0; d--) if (n % d === 0) return d;\n}\n"
    ),
    "HumanEval_13_greatest_common_divisor": (
        "  return b ? greatest_common_divisor(b, a % b) : a;\n}\n"
    ),
    "HumanEval_15_string_sequence": "  return [...Array(n + 1).keys()].join(' ');\n}\n",
    "HumanEval_14_all_prefixes": (
        "  return [...string].map((_, i) => string.slice(0, i + 1));\n}\n"
    ),
}

CPP = {
    "HumanEval_55_fib": "    return n < 2 ? n : fib(n - 1) + fib(n - 2);\n",
    "HumanEval_23_strlen": "    return string.size();\n",
    "HumanEval_45_triangle_area": "    return a * h / 2.0f;\n",
    "HumanEval_13_greatest_common_divisor": (
        "    return b ? greatest_common_divisor(b, a % b) : a;\n"
    ),
    "HumanEval_34_unique": (
        "    std::set<long> kept(l.begin(), l.end());\n    return {kept.begin(), kept.end()};\n"
    ),
}
