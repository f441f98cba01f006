#!/usr/bin/env bash
# Tests and measures Silva on one NVIDIA GPU, with or without a network: docs/gpu.md.
#
#   benchmarks/gpu.sh [--wheels FOLDER] [options of benchmarks/gpu.py; --help lists them]
#   benchmarks/gpu.sh wheels FOLDER [options of benchmarks/gpu_wheels.py]     on a machine with a network
#
# PYTHON      the interpreter that has torch (python3)
# SILVA_SITE  where wheels are installed, beside the checkout under the name `silva` (a folder in TMPDIR)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
site=${SILVA_SITE:-${TMPDIR:-/tmp}/silva-gpu-$(id -u)}

fail() {
    echo "gpu.sh: error: $1" >&2
    exit 2
}

command -v "$python" >/dev/null || fail "$python: no such program; set PYTHON to the interpreter that has torch"
if [[ ${1-} == wheels ]]; then
    shift
    PYTHONPATH=$root exec "$python" -m benchmarks.gpu_wheels "$@"
fi

rest=()
wheels=()
while (($#)); do
    case $1 in
        --wheels)
            (($# > 1)) || fail "--wheels: give the folder that holds them"
            [[ -n $(find "$2" -maxdepth 1 -name '*.whl' 2>/dev/null) ]] || fail "--wheels: $2 holds no *.whl"
            wheels+=("$2"/*.whl)
            shift 2
            ;;
        *)
            rest+=("$1")
            shift
            ;;
    esac
done

mkdir -p "$site/silva" 2>/dev/null || fail "$site cannot be written; set SILVA_SITE to another folder"
for folder in engine kernels recipes; do
    ln -sfn "$root/$folder" "$site/silva/$folder"
done
if ((${#wheels[@]})); then
    "$python" -m pip install --quiet --no-input --disable-pip-version-check --no-index --no-deps --no-compile \
        --upgrade --target "$site" "${wheels[@]}"
fi
export PYTHONPATH=$site:$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec "$python" -m benchmarks.gpu ${rest[@]+"${rest[@]}"}
