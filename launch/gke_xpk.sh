#!/usr/bin/env bash
# A command on TPU slices of a GKE cluster that xpk made. From the root of the repository:
#
#   launch/gke_xpk.sh --cluster C --workload my-run --tpu-type v5litepod-64 --image …/promptkd
#       [--num-slices 1] [--zone Z] [--project P] [--build docker|cloud|no] [--max-restarts 100]
#       [--spot] [--poll 30] [--no-check] [--dry-run]
#       -- promptkd train --config configs/llama.py:student=7b --workdir gs://bucket/run
#   launch/gke_xpk.sh --cluster C --workload my-run [--zone Z] [--project P] --delete
#
# Has `promptkd plan` check the command for these slices, builds an image of the working tree as
# IMAGE:WORKLOAD and pushes it, creates the workload, and shows the log of the first worker to the
# end. After a preemption all pods start again and the run continues from its bucket, up to
# --max-restarts times; a command that fails by itself ends the workload. After Ctrl-C the workload
# goes on.
#
#   --build B    docker: here; cloud: by Cloud Build; no: the image is there already
#   --spot       where the cluster makes its own node pools
#   --no-check   goes without the check, which needs promptkd here
#   --dry-run    checks, and prints the commands; runs none
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cluster='' workload='' tpu_type='' image='' zone='' project='' num_slices=1 build=docker
max_restarts=100 poll=30 spot='' delete=''
read_options "cluster workload tpu-type image zone project num-slices build max-restarts poll" \
  "spot delete no-check" "$@"
[[ $cluster && $workload ]] || fail "--cluster and --workload are needed"
need_cloud_name 40 cluster workload # as xpk has it
[[ ! $zone ]] || need_zone "$zone"
where=(--cluster="$cluster" --workload="$workload" ${zone:+--zone="$zone"}
  ${project:+--project="$project"})

if [[ $delete ]]; then
  run xpk workload delete "${where[@]}" --force
  exit
fi

need_program
[[ $tpu_type && $image ]] || fail "--tpu-type and --image are needed"
need_whole 1 num-slices
need_whole 0 max-restarts poll
[[ $build =~ ^(docker|cloud|no)$ ]] || fail "--build $build is none of docker, cloud, no"
[[ $image =~ ^[a-z0-9./:_-]+$ && ${image##*/} != *:* ]] ||
  fail "--image $image: lowercase and without a tag, which is the workload: HOST/PROJECT/REPOSITORY/NAME"
need_bucket "pods share no disk"
need_no_flags_of_processes
[[ -e setup.py ]] || fail "run this from the root of the repository: there is no setup.py in $PWD"
check_command --topology "$tpu_type" --slices "$num_slices"
image=$image:$workload

case $build in
  docker)
    run docker build --platform=linux/amd64 --file=launch/Dockerfile --tag="$image" .
    run docker push "$image"
    ;;
  cloud)
    run gcloud builds submit --config=launch/cloudbuild.yaml --substitutions=_IMAGE="$image" \
      ${project:+--project="$project"} .
    ;;
  no) ;;
esac

# `exec`: xpk passes SIGTERM on to what the command starts with.
run xpk workload create "${where[@]}" --tpu-type="$tpu_type" --num-slices="$num_slices" \
  --docker-image="$image" --max-restarts="$max_restarts" --termination-grace-period-seconds=120 \
  ${spot:+--spot} --command="exec bash launch/restartable.sh $(quoted "${program[@]}")"

first=jobset.sigs.k8s.io/jobset-name=$workload,jobset.sigs.k8s.io/job-index=0
first+=,batch.kubernetes.io/job-completion-index=0
log() { run kubectl logs --selector="$first" --container=jax-tpu "$@"; }
follow() {
  run kubectl wait pod --selector="$first" --for=condition=Ready --timeout=1m &&
    log --tail=-1 --follow
}
outcome() { run kubectl get jobset "$workload" --output='jsonpath={.status.terminalState}'; }

while true; do
  follow || note "no first worker yet, or no longer"
  if [[ $dry_run ]]; then
    outcome
    exit
  fi
  case $(outcome) in
    Completed) exit 0 ;;
    Failed)
      log --tail=30 || true
      fail "the workload $workload failed; 'kubectl describe jobset $workload' says where"
      ;;
    *) sleep "$poll" ;;
  esac
done
