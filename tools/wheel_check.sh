#!/usr/bin/env bash
# Build the wheel, install it into an empty environment outside the checkout, and see that it works there.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || { echo "wheel check: no $python; run \`make test\` first" >&2; exit 1; }

temp="$(mktemp -d)"
trap 'rm -rf "$temp"' EXIT
fail() { echo "wheel check FAILED: $*" >&2; exit 1; }

echo "==> building the wheel"
"$python" -m build --no-isolation --wheel --outdir "$temp/dist" "$root" >"$temp/build.log" 2>&1 ||
  { cat "$temp/build.log" >&2; fail "the build broke"; }
wheel="$(echo "$temp"/dist/expunge-*.whl)"
[[ -f "$wheel" ]] || fail "no wheel was built"

echo "==> comparing its files with src/expunge"
(cd "$root/src" && find expunge -type f ! -path '*/__pycache__/*' ! -name '*.pyc' | LC_ALL=C sort) >"$temp/source.txt"
"$python" -m zipfile -l "$wheel" | awk '$1 ~ /^expunge\// {print $1}' | LC_ALL=C sort >"$temp/wheel.txt"
diff "$temp/source.txt" "$temp/wheel.txt" || fail "the wheel and src/expunge differ"

echo "==> installing it into an empty environment (minutes: torch is large)"
"$python" -m venv "$temp/venv"
clean="$temp/venv/bin"
"$clean/python" -m pip install -q --disable-pip-version-check -c "$root/constraints.txt" "$wheel"
"$clean/python" -m pip check || fail "pip check"

echo "==> running it outside the checkout"
mkdir "$temp/away"
cd "$temp/away"
unset PYTHONPATH
"$clean/expunge" --version || fail "expunge --version"
"$clean/expunge" --help >"$temp/help.txt" || fail "expunge --help"
[[ -s "$temp/help.txt" ]] || fail "expunge --help says nothing"
"$clean/python" -W error -c "import expunge" || fail "import expunge"
where="$("$clean/python" -c 'import expunge; print(expunge.__file__)')"
[[ "$where" == "$temp/venv/"* ]] || fail "imported from $where, not from the wheel"
[[ -z "$(ls -A .)" ]] || fail "importing or asking for help wrote files: $(ls -A .)"
echo "wheel check passed: $(basename "$wheel")"
