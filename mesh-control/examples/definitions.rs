//! Prints the definition of one of Istio's kinds, as YAML: `definitions PLURAL`; run by `cargo xtask gen`.

use anyhow::Context as _;
use mesh_control::source::definitions::definitions;

fn main() -> anyhow::Result<()> {
    let plural = std::env::args().nth(1).context("which? the plural of a kind")?;
    let found =
        definitions().into_iter().find(|definition| definition["spec"]["names"]["plural"] == plural.as_str());
    println!("# Written by cargo xtask gen from mesh-control/src/source/kinds.rs; do not edit.");
    print!("{}", serde_yaml_ng::to_string(&found.with_context(|| format!("no kind {plural}"))?)?);
    Ok(())
}
