#!/bin/sh
# Builds the providers that are not written in Rust, each with the usual commands of its language.
#
#   providers/build.sh FOLDER [NAME FOLDER]…
#
# NAME.wasm goes into FOLDER, the first argument, for each NAME and the project FOLDER after it. A project with a
# Makefile is C, one with a package.json JavaScript, and any other Python. One with a copy of the SDK, as `fleecebox
# provider new` writes it, is built by the commands of its README.md, in a copy; the others by the SDK of this checkout.
#
# What was made of exactly these files of the project, of its SDK and of the contract is kept in the cache folder and
# not made again: Python's and JavaScript's components take a while, and are another file each time they are made, so
# that everything that is kept by a component's digest would be made again too.
#
# Environment:
#   FLEECEBOX_CACHE  where the tools and what was made are kept; .cache in the checkout unless set.
set -eu

checkout=$(cd "$(dirname "$0")/.." && pwd)
sdk=$checkout/guest-sdk
mkdir -p "${FLEECEBOX_CACHE:-$checkout/.cache}/languages"
cache=$(cd "${FLEECEBOX_CACHE:-$checkout/.cache}/languages" && pwd)

say() { echo "providers: $*" >&2; }
fail() {
    say "error: $*"
    exit 1
}

# Debian 12's own Node.js is too old for componentize-js.
newer_node() {
    at_least=$(sed -n 's/.*"node": ">=\([0-9]*\)".*/\1/p' "$sdk/javascript/package.json")
    [ "$(node --print 'parseInt(process.versions.node)')" -lt "$at_least" ] || return 0
    say "this Node.js is older than $at_least; fetching a newer one from npm"
    node=$(npm_config_cache=$cache/npm npx --yes --package=node@22 -c 'command -v node') || fail "npm has no Node.js"
    PATH=$(dirname "$node"):$PATH
}

main() {
    mkdir -p "$1"
    components=$(cd "$1" && pwd)
    shift
    while [ $# -gt 0 ]; do
        name=$1
        project=$(cd "$2" && pwd)
        shift 2
        if [ -d "$project/fleecebox-guest" ]; then
            language=own
        elif [ -f "$project/Makefile" ]; then
            language=c
        elif [ -f "$project/package.json" ]; then
            language=javascript
        else
            language=python
        fi
        case $language in
        own) made=$(digest "$project") ;;
        *) made=$(digest "$project" "$sdk/$language" "$checkout/wit") ;;
        esac
        made=$cache/$name-$made.wasm
        if [ ! -f "$made" ]; then
            say "building $name"
            work=$(mktemp -d "$cache/build.XXXXXX")
            "build_$language" || fail "$name could not be built"
            mv "$work/$name.wasm" "$made"
            rm -rf "$work"
        fi
        install -C -m 644 "$made" "$components/$name.wasm"
    done
}

# Of all files in the folders and of this one, by their names there and their contents; not of what a build leaves.
digest() {
    for folder in "$@" "$checkout/providers/build.sh"; do
        (cd "$(dirname "$folder")" && find "$(basename "$folder")" -type f ! -path '*/build/*' \
            ! -path '*/node_modules/*' ! -path '*/__pycache__/*' ! -name '*.wasm' -exec sha256sum {} +)
    done | LC_ALL=C sort | sha256sum | cut -c 1-16
}

# The first commands that its page shows, but for the last one, which tries what the others made.
build_own() {
    [ ! -f "$project/package.json" ] || newer_node
    cp -r "$project" "$work/project"
    # What they fetch is kept for the next project.
    commands=$(sed -n '/^```$/,/^```$/p' "$project/README.md" | sed '1d; /^```$/,$d')
    built=$(echo "$commands" | sed -n '$s/^fleecebox provider test //p')
    [ -n "$built" ] || return
    (cd "$work/project" && MAKEFLAGS='' PIP_CACHE_DIR=$cache/pip npm_config_cache=$cache/npm \
        npm_config_prefer_offline=true \
        sh -ec "$(echo "$commands" | sed '$d')" >&2) && mv "$work/project/$built" "$work/$name.wasm"
}

build_c() {
    # The variables of the make that may have called this are not for that one.
    MAKEFLAGS='' make -s -C "$project" OUT="$work" COMPONENT="$name" >&2
}

# The tool lies in an environment of its own, under the digest of what is in it; PYTHONPATH in place of installing the
# SDK, so that a change to it needs no new one.
build_python() {
    python=$cache/python-$(sha256sum <"$sdk/python/requirements.txt" | cut -c 1-16)
    if [ ! -e "$python/complete" ]; then
        say "installing componentize-py into $python"
        rm -rf "$python"
        python3 -m venv "$python" && "$python/bin/python" -m pip install --quiet --no-deps --require-hashes \
            --disable-pip-version-check -r "$sdk/python/requirements.txt" >&2 || return
        touch "$python/complete"
    fi
    (cd "$project" && PYTHONPATH=$sdk/python PYTHONDONTWRITEBYTECODE=1 \
        "$python/bin/python" -m fleecebox_guest.build "$name.py" -o "$work/$name.wasm" >&2)
}

# Likewise: the packages by the digest of the lock file that names them, and the SDK beside them as npm would link it.
# Not `npm ci`, which asks for a lock of packages for systems that not every registry has.
build_javascript() {
    newer_node
    packages=$cache/javascript-$(sha256sum <"$sdk/javascript/package-lock.json" | cut -c 1-16)
    if [ ! -e "$packages/complete" ]; then
        say "installing componentize-js and what it needs into $packages"
        rm -rf "$packages"
        mkdir "$packages" && cp "$sdk/javascript/package.json" "$sdk/javascript/package-lock.json" "$packages" &&
            npm install --prefix "$packages" --ignore-scripts --no-audit --no-fund --loglevel=error >&2 || return
        touch "$packages/complete"
    fi
    guest=$work/modules/@fleecebox/guest
    mkdir -p "$guest"
    (cd "$sdk/javascript" && cp -r build.js package.json provider.wit src "$guest")
    ln -s "$packages/node_modules" "$guest/node_modules"
    (cd "$project" && NODE_PATH=$work/modules node "$guest/build.js" "$name.js" -o "$work/$name.wasm" >&2)
}

main "$@"
