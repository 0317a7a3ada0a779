"""Every Triton kernel against its reference; compiling takes the time, so in many processes."""

import gpu_check

from gpu_suite_parts.report import Report, Settings


def run(settings: Settings, report: Report) -> None:
    found = gpu_check.correctness(settings.workers, "silu_and_mul" if settings.tiny else "", settings.deadline - 3)
    for kernel, entry in found["kernels"].items():
        detail = f"{entry['cases']} cases, largest error {entry['max_error']:.1e}"
        if entry["not_run"]:
            report.case(f"{kernel}: {entry['not_run']} of {entry['cases']} cases", "not run", "budget", quiet=True)
        report.case(kernel, "failed" if entry["failed"] else "ok", detail, quiet=True)
    for line in found["failures"]:
        name, _, problem = line.partition(": ")
        report.case(name, "failed", problem)
