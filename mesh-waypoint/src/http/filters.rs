//! What routes ask to be done to requests and responses; compiled once per configuration, then applied.

use mesh_core::model::{Filters, Listener};

pub mod headers;
pub mod redirect;
pub mod rewrite;

use headers::Edits;

/// The header changes of one rule or backend.
#[derive(Debug, Default)]
pub struct Compiled {
    /// Towards the application.
    pub request: Edits,
    /// Towards the client.
    pub response: Edits,
}

/// One rule, and each of its backends.
#[derive(Debug)]
pub struct RuleFilters {
    /// For every request of the rule.
    pub rule: Compiled,
    /// For a backend's share, in the order of the rule's backends.
    pub backends: Vec<Compiled>,
}

/// Compiles the filters of a listener, by index of route and rule.
///
/// # Errors
/// Object, field and reason of the first that cannot be applied.
pub fn compile(listener: &Listener) -> Result<Vec<Vec<RuleFilters>>, String> {
    let mut routes = Vec::with_capacity(listener.routes.len());
    for route in &listener.routes {
        let mut rules = Vec::with_capacity(route.rules.len());
        for (number, rule) in route.rules.iter().enumerate() {
            let at = |reason| format!("{}/{}: spec.rules[{number}]: {reason}", route.namespace, route.name);
            let backends = rule.backends.iter().map(|backend| compiled(&backend.filters));
            rules.push(RuleFilters {
                rule: compiled(&rule.filters).map_err(at)?,
                backends: backends.collect::<Result<_, _>>().map_err(at)?,
            });
        }
        routes.push(rules);
    }
    Ok(routes)
}

fn compiled(filters: &Filters) -> Result<Compiled, String> {
    // Rewrites and redirects depend on the request: `mesh_core::rewrite` does them.
    let Filters { request, response, rewrite: _, redirect: _ } = filters;
    Ok(Compiled { request: Edits::new(request)?, response: Edits::new(response)? })
}
