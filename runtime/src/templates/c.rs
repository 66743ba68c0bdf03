//! A source file, with the SDK's header and what it was generated from beside it.

use super::{File, Plan, Whole};

const SDK: &[Whole] = sdk!["c/":
    "fleecebox-guest.h",
    "mock.c",
    "mock.h",
    "provider.mk",
    "bindings/README.md",
    "bindings/provider.wit",
];

/// What the generator made of the contract's two worlds. The object file says what the component imports and exports.
const SIGHTED: &[Whole] = sdk!["c/":
    "bindings/provider/fleecebox.c",
    "bindings/provider/fleecebox.h",
    "bindings/provider/fleecebox_component_type.o",
];
const BLIND: &[Whole] = sdk!["c/":
    "bindings/blind-provider/fleecebox.c",
    "bindings/blind-provider/fleecebox.h",
    "bindings/blind-provider/fleecebox_component_type.o",
];

pub(super) fn project(plan: &Plan) -> Vec<File> {
    let source = plan.either(template!("c/sighted.c.in"), template!("c/blind.c.in"));
    let mut files = vec![
        plan.filled("main.c", source),
        plan.filled("test.c", template!("c/test.c.in")),
        plan.filled("Makefile", template!("c/Makefile.in")),
        plan.filled("README.md", template!("c/README.md.in")),
        plan.filled(".gitignore", template!("c/gitignore.in")),
    ];
    let bindings = if plan.blind { BLIND } else { SIGHTED };
    files.extend(SDK.iter().chain(bindings).copied().map(File::copy));
    files
}
