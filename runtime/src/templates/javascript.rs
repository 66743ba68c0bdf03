//! A package with a copy of the SDK beside it, which is a package too.

use super::{File, Plan, Whole};

const SDK: &[Whole] = sdk!["javascript/":
    "build.js",
    "index.d.ts",
    "mock.d.ts",
    "package.json",
    "provider.wit",
    "src/archive.js",
    "src/context.js",
    "src/error.js",
    "src/exported.js",
    "src/extent.js",
    "src/index.js",
    "src/mock/host.js",
    "src/mock/index.js",
    "src/objects.js",
    "src/volume.js",
];

pub(super) fn project(plan: &Plan) -> Vec<File> {
    let source = plan.either(
        template!("javascript/sighted.js.in"),
        template!("javascript/blind.js.in"),
    );
    let mut files = vec![
        plan.filled("main.js", source),
        plan.filled("main.test.js", template!("javascript/main.test.js.in")),
        plan.filled("package.json", template!("javascript/package.json.in")),
        plan.filled("README.md", template!("javascript/README.md.in")),
        plan.filled(".gitignore", template!("javascript/gitignore.in")),
    ];
    files.extend(SDK.iter().copied().map(File::copy));
    files
}
