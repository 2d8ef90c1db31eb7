#!/usr/bin/env bash
# Measures, compares and writes the summary. Reads ARGUMENTS, BASELINE, FAIL_ON, OUT and PULL_REQUEST.
# Exits with an error only where measuring was not possible; a failed comparison is an output, so that the
# results are uploaded before the job fails.
set -euo pipefail

summary="$OUT/summary.md"
mkdir -p "$OUT"
printf '%s' "${PULL_REQUEST:-}" > "$OUT/pull-request"
read -r -a arguments <<< "$ARGUMENTS"

# Writes what the command prints into the summary's file and keeps its exit code: 1 is a failed comparison.
compare() {
    local code=0
    attnbench compare "$@" --fail-on "$FAIL_ON" --markdown "$OUT/tables.md" || code=$?
    if [ "$code" -gt 1 ]; then exit "$code"; fi
    failed=$([ "$code" -eq 1 ] && echo true || echo false)
}

failed=false
case "$BASELINE" in
    git:*)
        compare "${BASELINE#git:}" . "${arguments[@]}" ;;
    "")
        attnbench run "${arguments[@]}" --quiet --out "$OUT/run"
        attnbench report "$OUT/run" --out "$OUT/report"
        cp "$OUT/report/report.md" "$OUT/tables.md" ;;
    *)
        attnbench run "${arguments[@]}" --quiet --out "$OUT/run"
        compare "$BASELINE" "$OUT/run" ;;
esac

{
    echo "## attnbench"
    echo
    if [ "$failed" = true ]; then echo "**Failed** (\`--fail-on $FAIL_ON\`)."; echo; fi
    cat "$OUT/tables.md"
    echo
    echo "Reproduce: \`attnbench run $ARGUMENTS\`"
} > "$summary"
rm "$OUT/tables.md"
cat "$summary" >> "${GITHUB_STEP_SUMMARY:-/dev/null}"
{
    echo "failed=$failed"
    echo "summary=$summary"
} >> "${GITHUB_OUTPUT:-/dev/null}"
