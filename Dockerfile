# docker build --build-arg VDROP_COMMIT=$(git rev-parse HEAD) -t vdrop . && docker run --rm -v "$PWD/outputs:/vdrop/outputs" vdrop
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends build-essential git && rm -rf /var/lib/apt/lists/*
WORKDIR /vdrop
ARG VDROP_COMMIT=""
# the commit that results name; the image has no .git
ENV VDROP_COMMIT=$VDROP_COMMIT
COPY . .
RUN make setup
CMD ["make", "demo"]
