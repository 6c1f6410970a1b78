//! TLS: a certificate and its key from files, read again when told to.
//!
//! Invariant: what is being served stays until the files that replace it are known to be good.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig};

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read the certificate of --tls-cert {}: {source}", path.display())]
    Certificate { path: PathBuf, source: pem::Error },
    #[error("--tls-cert {} has no certificate: it must be a PEM file, the server's own first", .0.display())]
    NoCertificate(PathBuf),
    #[error("cannot read the private key of --tls-key {}: {source}", path.display())]
    Key { path: PathBuf, source: pem::Error },
    #[error("--tls-cert and --tls-key do not work together: {0}")]
    Unfit(#[from] rustls::Error),
}

pub struct Tls {
    certificate: PathBuf,
    key: PathBuf,
    protocol: &'static [u8],
    config: RwLock<Arc<ServerConfig>>,
}

const HTTP1: &[u8] = b"http/1.1";
const HTTP2: &[u8] = b"h2";

impl Tls {
    /// For HTTP/1.1.
    pub fn open(certificate: &Path, key: &Path) -> Result<Tls, TlsError> {
        Tls::of_protocol(certificate, key, HTTP1)
    }

    /// With the same files.
    pub fn for_http2(&self) -> Result<Tls, TlsError> {
        Tls::of_protocol(&self.certificate, &self.key, HTTP2)
    }

    fn of_protocol(certificate: &Path, key: &Path, protocol: &'static [u8]) -> Result<Tls, TlsError> {
        let config = RwLock::new(Arc::new(config(certificate, key, protocol)?));
        Ok(Tls { certificate: certificate.to_owned(), key: key.to_owned(), protocol, config })
    }

    /// Reads the files again, for connections from now on.
    pub fn reload(&self) -> Result<(), TlsError> {
        let config = config(&self.certificate, &self.key, self.protocol)?;
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
        Ok(())
    }

    pub fn acceptor(&self) -> TlsAcceptor {
        self.config.read().unwrap_or_else(PoisonError::into_inner).clone().into()
    }
}

fn config(certificate: &Path, key: &Path, protocol: &[u8]) -> Result<ServerConfig, TlsError> {
    let unreadable = |source| TlsError::Certificate { path: certificate.into(), source };
    let chain = CertificateDer::pem_file_iter(certificate).map_err(unreadable)?;
    let chain = chain.collect::<Result<Vec<_>, _>>().map_err(unreadable)?;
    if chain.is_empty() {
        return Err(TlsError::NoCertificate(certificate.into()));
    }
    let key = PrivateKeyDer::from_pem_file(key).map_err(|source| TlsError::Key { path: key.into(), source })?;
    let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let builder = builder.with_safe_default_protocol_versions()?.with_no_client_auth();
    let mut config = builder.with_single_cert(chain, key)?;
    config.alpn_protocols = vec![protocol.to_vec()];
    Ok(config)
}
