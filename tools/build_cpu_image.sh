#!/usr/bin/env bash
# Builds the Dockerfile's cpu target and trains two steps in it. With a Docker daemon that is `docker build`. Without one buildah builds
# it, and where the base image cannot be pulled, Debian's packages stand in for it: the same release, installed fresh.
# As root on Debian or Ubuntu what is missing is installed. TORCH_WHEELS=FOLDER has torch's CPU build; PIP_CONF=FILE is pip's configuration.
set -euo pipefail
cd "$(dirname "$0")/.."
image=megatron-nsr:cpu
base=$(sed -n 's/^ARG CPU_IMAGE=//p' Dockerfile)
arguments=(--target cpu --tag "$image" --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)")
check=(bash /opt/megatron-nsr/share/megatron_nsr/tools/try_installed.sh /opt/megatron-nsr)

if docker info >/dev/null 2>&1; then
    docker build "${arguments[@]}" .
    exec docker run --rm --shm-size 2g "$image" "${check[@]}"
fi

work=$(mktemp -d)
container=
buildah() { command buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"; }
trap '[[ -z $container ]] || buildah rm "$container" >/dev/null; rm -rf "$work"' EXIT

missing=()
for program in buildah mmdebstrap; do command -v "$program" >/dev/null || missing+=("$program"); done
if ((${#missing[@]})); then
    echo "Installing ${missing[*]} ..."
    apt-get update -qq >/dev/null
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

if ! buildah pull -q "$base" >/dev/null 2>&1; then
    echo "$base cannot be pulled: a fresh Debian bookworm stands in for it"
    sources=(/etc/apt/sources.list.d/debian.sources)
    [[ -s /etc/apt/sources.list ]] && sources=(/etc/apt/sources.list)
    mmdebstrap --quiet --variant=minbase --include=ca-certificates bookworm "$work/debian.tar" "${sources[@]}"
    container=$(buildah from scratch)
    buildah add -q "$container" "$work/debian.tar" / >/dev/null
    buildah commit -q "$container" "$base" >/dev/null
    buildah rm "$container" >/dev/null
    container=
    rm "$work/debian.tar"
fi

# The build sees this machine's network as this machine does: pip's configuration and the certificates that it trusts.
mounts=()
for path in "${PIP_CONF:-/etc/pip.conf}" /etc/ssl/certs; do [[ ! -e $path ]] || mounts+=(--volume "$path:$path:ro"); done
if [[ -n ${TORCH_WHEELS:-} ]]; then
    mounts+=(--volume "$TORCH_WHEELS:/torch-wheels:ro")
    arguments+=(--build-arg "TORCH_SOURCE=--find-links /torch-wheels")
fi
buildah bud --isolation chroot --format docker --layers=false --pull-never "${mounts[@]}" "${arguments[@]}" .
container=$(buildah from --pull-never "localhost/$image")
buildah run --isolation chroot "$container" -- "${check[@]}"
