//! Attacks the check before a component runs: a sound component that is no provider.

// A native build has no use for it, and its linker none for the names of exports.
#[cfg(target_arch = "wasm32")]
mod greeter {
    #![allow(missing_docs, clippy::all)]

    wit_bindgen::generate!({
        inline: r#"
            package hostile:wrong-world;

            world greeter {
                export greet: func(name: string) -> string;
            }
        "#,
    });

    struct Greeter;

    impl Guest for Greeter {
        fn greet(name: String) -> String {
            format!("Good day, {name}")
        }
    }

    export!(Greeter);
}
