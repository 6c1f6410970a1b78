//! TLS of a client: the public authorities that Mozilla trusts, or those of one's own file alone.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};

#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    #[error("cannot read the certificates of --ca-cert {}: {source}", path.display())]
    Read { path: PathBuf, source: pem::Error },
    #[error("--ca-cert {} has no certificate: it must be a PEM file", .0.display())]
    Empty(PathBuf),
    #[error("--ca-cert {} has a certificate that nothing can be trusted by: {source}", path.display())]
    Unfit { path: PathBuf, source: rustls::Error },
    #[error("TLS cannot be set up: {0}")]
    Setup(#[from] rustls::Error),
}

/// The certificates of a PEM file, at least one.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TrustError> {
    let read = |source| TrustError::Read { path: path.to_owned(), source };
    let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).map_err(read)?.collect();
    let found = found.map_err(read)?;
    if found.is_empty() { Err(TrustError::Empty(path.to_owned())) } else { Ok(found) }
}

/// Whoever is vouched for by an authority of `ca_cert`, or is one of its certificates himself; else by a public one.
pub fn connector(ca_cert: Option<&Path>) -> Result<TlsConnector, TrustError> {
    let mut roots = RootCertStore::empty();
    match ca_cert {
        Some(path) => {
            for certificate in certificates(path)? {
                let unfit = |source| TrustError::Unfit { path: path.to_owned(), source };
                roots.add(certificate).map_err(unfit)?;
            }
        }
        None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let builder = builder.with_safe_default_protocol_versions()?;
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config).into())
}
