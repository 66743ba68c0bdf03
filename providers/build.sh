#!/bin/sh
# Builds the providers that are not written in Rust, each with the usual commands of its language.
#
#   providers/build.sh FOLDER [NAME FOLDER]…
#
# NAME.wasm goes into FOLDER, the first argument, for each NAME and the project FOLDER after it. A project with a
# Makefile is C, one with a package.json JavaScript, and any other Python. A FOLDER that ends in `:sighted` or `:blind`
# is that template of guest-sdk/templates, and the project is what it becomes.
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

main() {
    mkdir -p "$1"
    components=$(cd "$1" && pwd)
    shift
    while [ $# -gt 0 ]; do
        name=$1
        project=$(cd "${2%:*}" && pwd)
        variant=${2##*:}
        shift 2
        if [ -f "$project/Makefile" ] || [ -f "$project/Makefile.in" ]; then
            language=c
        elif [ -f "$project/package.json" ] || [ -f "$project/package.json.in" ]; then
            language=javascript
        else
            language=python
        fi
        made=$cache/$name-$(digest "$project" "$sdk/$language" "$checkout/wit" "$0").wasm
        if [ ! -f "$made" ]; then
            say "building $name ($language)"
            work=$(mktemp -d "$cache/build.XXXXXX")
            main=$name
            case $variant in sighted | blind) fill_in ;; esac
            "build_$language" || fail "$name could not be built"
            mv "$work/$name.wasm" "$made"
            rm -rf "$work"
        fi
        install -C -m 644 "$made" "$components/$name.wasm"
    done
}

# Makes a project of a template, as `fleecebox provider new` does, but for the copy of the SDK.
fill_in() {
    [ "$variant" = blind ] && world=blind-provider || world=provider
    main=main
    mkdir "$work/project"
    for file in "$project/$variant".*.in "$project/Makefile.in"; do
        [ -f "$file" ] || continue
        filled=$(basename "$file" .in)
        sed "s/{{name}}/$name/g; s/{{Type}}/Filled/g; s/{{world}}/$world/g; s|fleecebox-guest/provider.mk|$sdk/c/provider.mk|" \
            "$file" >"$work/project/$(echo "$filled" | sed "s/^$variant/main/")"
    done
    project=$work/project
}

# Of all files in the folders, by their names and contents; not of what a build leaves there.
digest() {
    (cd "$checkout" && find "$@" -type f ! -path '*/build/*' ! -path '*/node_modules/*' ! -path '*/__pycache__/*' \
        ! -name '*.wasm' -exec sha256sum {} +) | sed "s|$checkout/||" | LC_ALL=C sort | sha256sum | cut -c 1-16
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
        "$python/bin/python" -m fleecebox_guest.build "$main.py" -o "$work/$name.wasm" >&2)
}

# Likewise: the packages by the digest of the lock file that names them, and the SDK beside them as npm would link it.
# Not `npm ci`, which asks for a lock of packages for systems that not every registry has.
build_javascript() {
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
    (cd "$project" && NODE_PATH=$work/modules node "$guest/build.js" "$main.js" -o "$work/$name.wasm" >&2)
}

main "$@"
