#!/bin/sh
# The student's own traces, once around: sample, grade, score, select, export; then refined by an
# oracle, which is the student once more, and compared with the native ones. All into FOLDER.
#
#     sh jobs/demo/loop.sh FOLDER [NUM_PROBLEMS]
#     sh "$(python -c 'import rsr.jobs.demo as demo; print(demo.__path__[0])')/loop.sh" FOLDER
#
# The second line is for an installed package. `rsr` and `python` are those of the
# PATH. Stopped half way, the same command goes on.
set -eu
folder=$1
num_problems=${2:-24}
student=$(python -c 'from rsr.jobs.demo.student import demo_student; print(demo_student())')
mkdir -p "$folder"

# Written once: a run goes on only with the input that it began with.
test -f "$folder/problems.parquet" ||
  python -c 'import sys; from rsr.jobs.demo.problems import write_problems as w
w(sys.argv[1], num_problems=int(sys.argv[2]))' "$folder/problems.parquet" "$num_problems"
cat > "$folder/prompt.yaml" <<'PROMPT'
user: |
  {{ problem }}
  Work step by step, and end with a line "Answer:" and the number.
PROMPT

set -x
rsr sample "$folder/problems.parquet" "$folder/sampled" --model "$student" --dtype float32 \
  -n 8 --temperature 0.7 --top-p 0.95 --max-tokens 160 --prompt-file "$folder/prompt.yaml"
rsr grade "$folder/sampled" "$folder/graded" --answer-column answer
rsr score "$folder/graded" "$folder/scored" --model "$student" --dtype float32 --max-refused 1 \
  --token-columns
rsr select "$folder/scored" "$folder/selected" --group-by problem_id --require correct
rsr export "$folder/selected" "$folder/dataset" --format messages --shuffle-seed 1

rsr refine "$folder/graded" "$folder/refined" --mode minimal --answer-column answer \
  --model "$student" --dtype float32 --temperature 0.3 --max-tokens 240
rsr grade "$folder/refined" "$folder/refined-graded" --answer-column answer
rsr score "$folder/refined-graded" "$folder/refined-scored" --model "$student" --dtype float32 \
  --max-refused 1 --token-columns
rsr compare "$folder/scored" "$folder/refined-scored"
rsr report "$folder/scored" "$folder/report.html" --teacher-column sample_model \
  --compare "$folder/refined-scored"
