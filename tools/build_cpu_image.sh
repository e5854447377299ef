#!/usr/bin/env bash
# Builds the Dockerfile's cpu target and trains two steps in it. With a Docker daemon that is `docker build`. Without one buildah builds
# it, as root, and where the base image cannot be pulled, Debian's packages stand in for it: the same release, installed fresh.
# buildah and mmdebstrap are installed where they are missing; image and containers are removed at the end. 20 GiB of free disk are needed.
# TORCH_WHEELS is where torch's CPU build is: the URL of an index, or, without Docker, a folder or a wheel. PIP_CONF=FILE is pip's
# configuration then.
set -euo pipefail
cd "$(dirname "$0")/.."
image=megatron-nsr:cpu
base=$(sed -n 's/^ARG CPU_IMAGE=//p' Dockerfile)
arguments=(--target cpu --tag "$image" --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)")
check=(bash /opt/megatron-nsr/share/megatron_nsr/tools/try_installed.sh /opt/megatron-nsr)

fail() {
    echo "build_cpu_image: $*" >&2
    exit 1
}

wheels=
case ${TORCH_WHEELS:-} in
"") ;;
*://*) arguments+=(--build-arg "TORCH_SOURCE=--extra-index-url $TORCH_WHEELS") ;;
*)
    wheels=$(realpath -e "$TORCH_WHEELS" 2>/dev/null) || fail "TORCH_WHEELS=$TORCH_WHEELS: no such folder or wheel"
    arguments+=(--build-arg "TORCH_SOURCE=--find-links /torch-wheels")
    ;;
esac

if docker info >/dev/null 2>&1; then
    [[ -z $wheels ]] || fail "TORCH_WHEELS=$TORCH_WHEELS: docker build sees no file of this machine; name the URL of an index"
    docker build "${arguments[@]}" .
    exec docker run --rm --shm-size 2g "$image" "${check[@]}"
fi
[[ $(id -u) = 0 ]] || fail "no Docker daemon answers, and without one root is needed, for buildah"

# provide PROGRAM PACKAGE...: Debian's packages, where the program is missing.
provide() {
    ! command -v "$1" >/dev/null || return 0
    echo "Installing $1 ..."
    apt-get update -qq >/dev/null
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${@:2}" >/dev/null
}

provide buildah buildah
work=$(mktemp -d)
buildah() { TMPDIR=$work command buildah --root "$work/storage" --runroot "$work/run" "$@"; }
trap 'buildah rm --all >/dev/null 2>&1 || true; rm -rf --one-file-system "$work"' EXIT

if ! buildah pull -q "$base" >/dev/null 2>&1; then
    echo "$base cannot be pulled: a fresh Debian bookworm stands in for it"
    provide mmdebstrap mmdebstrap debian-archive-keyring
    mapfile -t sources < <(grep -ls bookworm /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources)
    mmdebstrap --quiet --variant=minbase --include=ca-certificates bookworm "$work/debian.tar" "${sources[@]}"
    container=$(buildah from scratch)
    buildah add -q "$container" "$work/debian.tar" / >/dev/null
    buildah commit -q --rm "$container" "$base" >/dev/null
    rm "$work/debian.tar"
fi

# The build sees this machine's network as this machine does: pip's configuration and the certificates that it trusts.
mounts=()
for path in "${PIP_CONF:-/etc/pip.conf}" /etc/ssl/certs; do [[ ! -e $path ]] || mounts+=(--volume "$path:$path:ro"); done
[[ -z $wheels ]] || mounts+=(--volume "$wheels:/torch-wheels$([[ -d $wheels ]] || echo "/${wheels##*/}"):ro")
buildah bud --isolation chroot --format docker --layers=false --pull-never "${mounts[@]}" "${arguments[@]}" .
container=$(buildah from --pull-never "localhost/$image")
buildah run --isolation chroot "$container" -- "${check[@]}"
