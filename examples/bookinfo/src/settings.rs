//! Environment variables, read once at start.

/// Looks up one variable; tests pass a table instead of the process environment.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// A service to call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Host name, resolved at every call.
    pub host: String,
    /// Port.
    pub port: u16,
}

impl Target {
    /// `<NAME>_HOSTNAME`, `<NAME>_SERVICE_PORT` and `SERVICES_DOMAIN`, as all of Bookinfo reads them.
    ///
    /// # Errors
    /// When the port is not a number.
    pub fn from_env(name: &str, env: Lookup<'_>) -> anyhow::Result<Self> {
        let upper = name.to_uppercase();
        let mut host = env(&format!("{upper}_HOSTNAME")).unwrap_or_else(|| name.to_owned());
        if let Some(domain) = env("SERVICES_DOMAIN").filter(|domain| !domain.is_empty()) {
            host = format!("{host}.{domain}");
        }
        let variable = format!("{upper}_SERVICE_PORT");
        let port = match env(&variable) {
            None => 9080,
            Some(text) => text.parse().map_err(|_| anyhow::anyhow!("{variable}: {text:?} is not a port"))?,
        };
        Ok(Self { host, port })
    }
}

/// Whether a variable says true.
pub fn flag(name: &str, env: Lookup<'_>) -> bool {
    env(name).is_some_and(|value| value.eq_ignore_ascii_case("true"))
}

/// The pod's name: `HOSTNAME`, else the machine's.
pub fn pod_name(env: Lookup<'_>) -> String {
    let machine = || nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    env("HOSTNAME").or_else(machine).unwrap_or_else(|| "unknown".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(variables: &[(&str, &str)]) -> Result<(String, u16), String> {
        let env = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, v)| (*v).to_owned());
        Target::from_env("ratings", &env).map(|t| (t.host, t.port)).map_err(|error| error.to_string())
    }

    #[test]
    fn targets() {
        assert_eq!(target(&[]), Ok(("ratings".into(), 9080)));
        assert_eq!(target(&[("SERVICES_DOMAIN", "")]), Ok(("ratings".into(), 9080)));
        assert_eq!(target(&[("SERVICES_DOMAIN", "shop.svc")]), Ok(("ratings.shop.svc".into(), 9080)));
        assert_eq!(
            target(&[("RATINGS_HOSTNAME", "127.0.0.1"), ("RATINGS_SERVICE_PORT", "81")]),
            Ok(("127.0.0.1".into(), 81))
        );
        let error = target(&[("RATINGS_SERVICE_PORT", "http")]).expect_err("not a port");
        assert_eq!(error, "RATINGS_SERVICE_PORT: \"http\" is not a port");
    }
}
